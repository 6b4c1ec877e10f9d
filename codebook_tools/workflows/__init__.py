"""One function and one result for each command."""
