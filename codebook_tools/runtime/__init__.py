"""What any program needs and no codebook: processes, threads, devices, progress, files types, the version."""
