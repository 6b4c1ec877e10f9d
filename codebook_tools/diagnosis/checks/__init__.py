"""One cause of a collapse a file."""
