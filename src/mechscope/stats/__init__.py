"""Statistics of their own, apart from models and plots: streaming moments, intervals, tests, geometry, spectra."""
