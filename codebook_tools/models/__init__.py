"""Models: how files are recognised and what follows from it, one record a family, and the model that runs."""
