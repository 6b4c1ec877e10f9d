"""Networks: encode, walk, decode. What becomes of a latent in between, their caller decides."""
