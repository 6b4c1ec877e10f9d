"""One pass over data, what it adds up, and the figures of that."""
