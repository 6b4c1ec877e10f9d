"""Figures that papers quote, by the libraries that papers use: one file a figure."""
