"""What bench.py runs beside training and generation."""
