"""What a study reads off its two models beside the difference: head roles, cards of the selected heads, a lens on the summaries."""

from __future__ import annotations

from typing import Any

from mechscope.data.pairs import from_examples
from mechscope.data.template import Template
from mechscope.progress import Progress
from mechscope.store.run import RunFolder
from mechscope.studies.corpora import Splits
from mechscope.studies.lens_stages import Asked, lens_stage
from mechscope.studies.role_stages import Documents, attention_stage, cards_stage, roles_stage
from mechscope.subject import Components, Pair

# generated texts per role: the roles of a study are one section of many
_PROBES = 16


def reading_stages(run: RunFolder, pair: Pair, splits: Splits, settings: Any, heads: Components, *, progress: Progress | None) -> None:
    """Score roles, describe the selected heads and read the layers, as far as the settings ask for it.

    Args:
        run: A run whose heads are selected.
        pair: The models.
        splits: The documents; held-out ones are read.
        settings: `ReadingStudySettings` and `DataSettings` together.
        heads: The selected heads.
        progress: Called with what is being done.
    """
    models = {"base": pair.base, "tuned": pair.tuned}
    read = Documents(splits.corpora["test"], splits.encoded["test"], Template(settings.template))
    if settings.roles:
        roles_stage(run, models, read.first(settings.role_documents), probes=_PROBES, seed=settings.seed, progress=progress)
        cards_stage(run, pair, read.encoded, heads, progress=progress)
        attention_stage(run, models, read.encoded.examples[:1], heads, progress=progress)
    if settings.lens:
        texts = from_examples(read.first(settings.lens_documents).encoded, read.corpus.source)
        lens_stage(run, models, Asked(texts, attribution="target-logit"), progress=progress)
