"""A monitor of the codebooks in anybody's training loop."""
