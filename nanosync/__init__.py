"""Machinery of the scripts: the life of a run, processes, data, logs. It knows no model class."""
