"""What stands downstream of a codebook, and follows it by its index map: stored tokens and priors."""
