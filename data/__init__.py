"""Data sets, one folder each with a prepare.py, and what those share: file formats and tokenizers."""
