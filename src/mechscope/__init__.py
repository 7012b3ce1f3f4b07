"""mechscope: a microscope for what fine-tuning does to GPT-like language models."""
