"""Knows nothing of codebooks: processes, threads, devices, progress, safe reading, type checks, options, version."""
