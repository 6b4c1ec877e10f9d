"""What a fine-tuning is made of, one idea a file; the loop over all of it is finetune.py."""
