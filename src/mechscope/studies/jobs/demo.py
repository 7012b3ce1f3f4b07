"""`mechscope demo`: the whole study on the embedded default, a small model and generated news articles; offline, in minutes on two cores."""

from __future__ import annotations

from dataclasses import replace

from mechscope.settings.contest import ContestSettings
from mechscope.settings.decoding import Decoding
from mechscope.settings.training import TrainSettings
from mechscope.studies.jobs.summarization import JOB as SUMMARIZATION
from mechscope.studies.paper_2505_17073.settings import StudySettings


def demo_settings() -> StudySettings:
    """Return settings sized so that everything, bake-off included, ends in about seven minutes on two cores."""
    from mechscope.data.newsroom import newsroom_model_path

    return StudySettings(
        base=str(newsroom_model_path()),
        data="newsroom",
        train_documents=240,
        validation_documents=24,
        test_documents=80,
        max_tokens=256,
        # a model of 1.5 million parameters learns from few steps at rates that would wreck a large one
        training=TrainSettings(
            learning_rate_full=1e-3, learning_rate_lora=3e-3, batch_size=8, max_steps=24, eval_every=8, warmup=0.1, patience=2
        ),
        decoding=Decoding(max_new_tokens=48),
        contest=ContestSettings(
            seeds=2, strategies="standard,targeted_layers,targeted_heads,circuit,random_layers,random_circuit,full,none"
        ),
        rouge_documents=24,
        control_documents=12,
        causal_documents=12,
        circuit_documents=16,
        role_documents=12,
        lens_documents=6,
        dictionaries=True,
        dictionary_latents=256,
        dictionary_k=16,
        dictionary_steps=1100,
        dictionary_batch=256,
        dictionary_rate=1e-2,
    )


JOB = replace(
    SUMMARIZATION,
    name="demo",
    help="Run the whole study on the embedded default: a small model and generated news articles.",
    example="mechscope demo",
    group="",
    preset=demo_settings,
    function="",
)
