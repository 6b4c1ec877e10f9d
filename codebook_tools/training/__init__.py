"""Fine-tuning, one concept a file; the training loop over all of it is finetune.py."""
