"""The commands: one file for each name that is typed. Those of surgeries are made from their classes, in surgery.py."""
