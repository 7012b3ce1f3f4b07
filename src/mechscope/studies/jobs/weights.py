"""`mechscope weights`: what heads and neurons attend to, copy and write, read off their weights in the model's own vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mechscope.errors import SettingsError
from mechscope.settings import Count, Number, setting
from mechscope.studies.groups import MaybeCorpus, ModelAndTuned
from mechscope.studies.inputs import DOCUMENTS, MODELS
from mechscope.studies.job import Job, Stage
from mechscope.studies.run import JobRun, Tables

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.instrument import Execution
    from mechscope.subject import Components, Pair, Subject
    from mechscope.weights.compositions import Kind

log = logging.getLogger(__name__)

# singular vectors written out per head, and tokens at each end of each
_VECTORS, _ENDS = 3, 8


@dataclass(frozen=True, kw_only=True)
class WeightsSettings(ModelAndTuned, MaybeCorpus):
    """Which models, heads and neurons."""

    panel: ClassVar[str] = "Weights"

    components: str | None = setting(None, 'Heads that are written out, e.g. "a3.h5,a4.h1"; by default those that changed or copy most.')
    heads: Number = setting(8, "How many heads, where none are named.")
    top: Number = setting(10, "Tokens kept per list.")
    offset: Count = setting(1, "Distance from query to key at which the attention of rotary models is written out, in tokens.")
    data: str | None = setting(None, "Documents with summaries to watch neurons on; without, only weights are read.")
    documents: Number = setting(60, "Documents to watch neurons on.")
    neurons: Number = setting(40, "How many neurons are written out.")
    tokens_per_batch: Number | None = setting(2048, "Most tokens of a batch of texts, padding included; decides the memory.")


def _heads(run: JobRun[WeightsSettings]) -> Components | None:
    """Return the named heads; None where the job is to choose."""
    from mechscope.subject import Components
    from mechscope.subject.components import chosen_heads

    named = run.settings.components
    return None if named is None else Components.of_heads(chosen_heads(run.first.anatomy, named))


def _check(run: JobRun[WeightsSettings]) -> None:
    from mechscope.data.scoring import check_fits

    _heads(run)
    positions, offset = run.first.anatomy.max_positions, run.settings.offset
    if offset >= positions:
        raise SettingsError(f"setting 'offset' is {offset}: the model has {positions} positions, so keys lie up to {positions - 1} behind")
    if (documents := run[DOCUMENTS]) is not None:
        for subject in run[MODELS].values():
            check_fits(subject, documents.pairs)


def _weights(run: JobRun[WeightsSettings]) -> Tables:
    import pandas as pd

    from mechscope.subject import pair
    from mechscope.weights import head_changes, weight_heads

    settings, subjects, execution = run.settings, run[MODELS], run.execution
    models: dict[str, Subject | Pair] = dict(subjects)
    described = [weight_heads(one, execution=execution).assign(model=label) for label, one in subjects.items()]
    tables = {"weight_heads": pd.concat(described, ignore_index=True)}
    changes = None
    if "tuned" in subjects:
        models["change"] = both = pair(subjects["base"], subjects["tuned"])
        changes = tables["weight_changes"] = head_changes(both, offset=settings.offset)
    heads = _heads(run) or _most_telling(described[-1], changes, number=settings.heads)
    tokens, singular, kinds = _written_out(models, heads, settings, execution)
    columns = ["model", "matrix", "component", "layer", "head", "sign", "place", "source", "target", "value"]
    tables["weight_tokens"] = pd.concat(tokens, ignore_index=True)[columns]
    tables["weight_singular"] = pd.concat(singular, ignore_index=True)
    tables["composition"] = _composed(subjects, kinds, offset=settings.offset, execution=execution)
    return tables


def _written_out(
    models: Mapping[str, Subject | Pair], heads: Components, settings: WeightsSettings, execution: Execution
) -> tuple[list[pd.DataFrame], list[pd.DataFrame], Sequence[Kind]]:
    """Return tokens and singular vectors of every model's OV and QK circuits, and the kinds of composition that can be measured."""
    from mechscope.errors import ModelError
    from mechscope.weights import ov_tokens, qk_tokens, singular_tokens

    k, offset = settings.top, settings.offset
    tokens = [ov_tokens(one, heads=heads, k=k, execution=execution).assign(model=label, matrix="ov") for label, one in models.items()]
    singular = [singular_tokens(one, matrix="ov", heads=heads, n=_VECTORS, k=_ENDS).assign(model=label) for label, one in models.items()]
    try:
        for label, one in models.items():
            attended = qk_tokens(one, heads=heads, k=k, offset=offset, execution=execution)
            tokens.append(attended.rename(columns={"query": "source", "key": "target"}).assign(model=label, matrix="qk"))
            vectors = singular_tokens(one, matrix="qk", heads=heads, n=_VECTORS, k=_ENDS, offset=offset)
            singular.append(vectors.assign(model=label))
    except ModelError as error:
        log.warning(
            "what heads attend to is left out: %s",
            error,
            extra={"weakens": "weight_heads", "withheld": "what heads attend to, by their weights"},
        )
        return tokens, singular, ("v",)
    return tokens, singular, ("q", "k", "v")


def _composed(subjects: Mapping[str, Subject], kinds: Sequence[Kind], *, offset: int, execution: Execution) -> pd.DataFrame:
    import pandas as pd

    from mechscope.weights import composition

    composed = [
        composition(one, kinds=kinds, offset=offset, execution=execution)
        .rename(columns={"from": "source", "to": "target"})
        .assign(model=label)
        for label, one in subjects.items()
    ]
    return pd.concat(composed, ignore_index=True)


def _most_telling(described: pd.DataFrame, changes: pd.DataFrame | None, *, number: int) -> Components:
    """Return the heads whose OV changed most, or of one model those that copy or suppress most."""
    from mechscope.subject import Components

    if changes is not None:
        names = changes.head(number)["component"]
    else:
        most = described.assign(size=described[["copied", "suppressed"]].max(axis=1)).sort_values("size", ascending=False, kind="stable")
        names = most.head(number)["component"]
    return Components.parse(",".join(names))


def _neurons(run: JobRun[WeightsSettings]) -> Tables:
    from mechscope.studies.neurons import neuron_tables

    documents = run[DOCUMENTS]
    return {} if documents is None else neuron_tables(run[MODELS], documents.pairs, number=run.settings.neurons, execution=run.execution)


WEIGHTS = Stage(name="weights", work=_weights, hangs_on=("components", "heads", "top", "offset", "seed"), inputs=(MODELS,))
NEURONS = Stage(
    name="neurons",
    work=_neurons,
    hangs_on=("neurons",),
    inputs=(MODELS, DOCUMENTS),
    when=lambda settings: settings.data is not None,
)


def _title(names: Mapping[str, str]) -> str:
    if "tuned" in names:
        return f"What the weights of {names['base']} say, before and after fine-tuning"
    return f"What the weights of {names['model']} say"


JOB = Job(
    name="weights",
    help="What heads and neurons attend to, copy and write, read off their weights in the model's vocabulary.",
    panel="read",
    example="mechscope weights gpt2 --components a5.h1,a10.h7 --out runs/weights",
    settings=WeightsSettings,
    arguments=("model", "tuned"),
    inputs=(MODELS, DOCUMENTS),
    stages=(WEIGHTS, NEURONS),
    sections=("head-weights", "neurons"),
    title=_title,
    check=_check,
    function="read_weights",
)
