"""On tensors alone: the nearest code, k-means, seeds, pairwise merging."""
