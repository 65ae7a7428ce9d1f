"""The modes of bench.py besides training and generation, and the harness that all modes share."""
