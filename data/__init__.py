"""Data sets, a folder each with a prepare.py, and the writer of token files that they share."""
