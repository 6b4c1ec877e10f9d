"""Network families: encode, decode, and where each keeps its codebook."""
