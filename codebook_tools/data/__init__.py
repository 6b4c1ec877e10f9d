"""Files in, batches out: items, data sets, splits, samples, latents; one file a modality."""
