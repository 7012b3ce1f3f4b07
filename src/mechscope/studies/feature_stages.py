"""The stages of a comparison of two models by dictionaries; light, so that jobs can name them: what is heavy is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mechscope.studies.job import Stage
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.studies.feature_difference import Request


def stages(
    request: Callable[[JobRun[Any]], Request],
    *,
    inputs: tuple[Input[Any], ...],
    settings: tuple[str, ...] | None = None,
    split: tuple[str, ...] = (),
    name: str = "training",
    after: tuple[Stage, ...] = (),
    when: Callable[[Any], bool] = lambda settings: True,
) -> tuple[Stage, Stage, Stage, Stage]:
    """Return the stages that train dictionaries, judge their latents, test what these carry, and list them.

    Args:
        request: Returns what is compared.
        inputs: What is loaded and decides the result.
        settings: Settings that decide which dictionaries there are; by default the fields of `DictionaryComparison`, each for the stages that it is for.
        split: Settings that decide which texts are judged on.
        name: What the stage that trains is called.
        after: Stages that make the models.
        when: Whether any of it is done.
    """

    def trained(run: JobRun[Any]) -> Tables:
        from mechscope.studies.feature_difference import train_all

        return train_all(request(run))

    def judged(run: JobRun[Any]) -> Tables:
        from mechscope.studies.feature_judgement import judge_all

        return judge_all(request(run))

    def carried(run: JobRun[Any]) -> Tables:
        from mechscope.studies.feature_carried import carry_all

        return carry_all(request(run))

    def shown(run: JobRun[Any]) -> Tables:
        from mechscope.studies.feature_judgement import show_candidates

        return show_candidates(request(run))

    plans = ("places", "latents", "rule", "k", "difference", "own_controls", "live", "objective", "training", "harvest", "plant")
    own = (plans, ("exclusive",), ("causal_documents", "random_draws"), ("latent",))
    first, second, third, fourth = ((*(settings or names), *split, "seed") for names in own)
    training = Stage(name=name, work=trained, hangs_on=first, inputs=inputs, after=after, when=when, alone=True)
    judgement = Stage(name="judgement", work=judged, hangs_on=second, inputs=inputs, after=(training,), when=when, alone=True)
    behind = (training, judgement)
    return (
        training,
        judgement,
        Stage(name="carried", work=carried, hangs_on=third, inputs=inputs, after=behind, when=when, alone=True),
        Stage(name="candidates", work=shown, hangs_on=fourth, inputs=inputs, after=behind, when=when, alone=True),
    )
