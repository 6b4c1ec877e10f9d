"""Why a codebook collapsed: what is gathered of a model once, and one check a cause."""
