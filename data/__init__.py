"""Data sets, a folder each with a prepare.py, and prepare.py for any corpus, whose machinery they share."""
