"""Algorithms on tensors: nearest code, k-means, seeding, pairwise merging."""
