"""How the checkpoints of each library are recognised and read: without torch."""
