"""Models: how files are recognized and what follows from it, one record a family, and the model that runs."""
