"""The pipelines: what a person asks, answered from the tools below."""
