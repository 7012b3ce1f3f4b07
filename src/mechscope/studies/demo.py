"""The embedded default: the whole study on a small model and generated news articles, offline, in minutes on two cores."""

from __future__ import annotations

from mechscope.data.newsroom import newsroom_model_path
from mechscope.studies.settings import StudySettings


def demo_settings() -> StudySettings:
    """Return the settings of `mechscope demo`: sized so that everything, bake-off included, ends in about four minutes on two idle cores."""
    return StudySettings(
        base=str(newsroom_model_path()),
        data="newsroom",
        train_documents=240,
        validation_documents=24,
        test_documents=80,
        max_tokens=256,
        # a model of 1.5 million parameters learns from few steps at rates that would wreck a large one
        learning_rate_full=1e-3,
        learning_rate_lora=3e-3,
        batch_size=8,
        max_steps=24,
        eval_every=8,
        warmup=0.1,
        patience=2,
        seeds=2,
        max_new_tokens=48,
        rouge_documents=24,
        causal_documents=12,
        circuit_documents=16,
        role_documents=12,
        lens_documents=6,
        strategies="standard,targeted_layers,targeted_heads,circuit,random_layers,random_circuit,full,none",
    )
