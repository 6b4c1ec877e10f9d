"""What any program needs and no codebook: processes, threads, devices, progress, safe reading, types, the version."""
