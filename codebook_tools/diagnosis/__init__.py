"""Why a codebook collapsed: evidence that is gathered once, and one check for each cause."""
