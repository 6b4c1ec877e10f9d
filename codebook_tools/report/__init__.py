"""What happened, for people: tables of results."""
