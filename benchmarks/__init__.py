"""Time and memory of mechscope's hot paths and of its peers, measured by one harness: `python -m benchmarks --help`."""
