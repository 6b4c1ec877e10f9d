"""Stored tokens and priors follow the index maps of their codebooks."""
