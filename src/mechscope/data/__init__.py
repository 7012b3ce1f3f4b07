"""Documents, prompts, task metrics and generated corpora."""
