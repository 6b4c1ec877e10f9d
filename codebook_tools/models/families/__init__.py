"""How the checkpoints of each family are recognized and read; without torch."""
