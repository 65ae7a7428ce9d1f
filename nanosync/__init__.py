"""The machinery behind the scripts: a run from its lock to its end, processes, data, logs. Knows no model
class."""
