"""What a fine-tuning minimises, one loss a file."""
