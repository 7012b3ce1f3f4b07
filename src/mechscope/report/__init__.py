"""The report of a run: figures and one self-contained HTML page, from the run's tables alone. It never runs a model."""
