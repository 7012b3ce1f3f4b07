"""The stage that measures routing of mixtures of experts: of one model, or of a base and a tuned one on the same texts.

Light at import, so that jobs can name the stage: what is heavy is imported where it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mechscope.studies.inputs import MODELS, Documents
from mechscope.studies.job import Stage
from mechscope.studies.run import Input, JobRun, Tables

if TYPE_CHECKING:
    from mechscope.data.pairs import Pairs
    from mechscope.weights import Routing

log = logging.getLogger(__name__)


def routing_stage(texts: Input[Any], *, where_routed: bool = False) -> Stage:
    """Make the stage `routing`.

    Args:
        texts: What is read: texts or documents.
        where_routed: Whether it is only done of mixtures of experts whose routers can be read; otherwise other models are an error.
    """

    def work(run: JobRun[Any]) -> Tables:
        from mechscope.errors import ModelError

        if where_routed and not any(block.experts for block in run.first.anatomy.blocks):
            return {}
        given = run[texts]
        try:
            return _measured(run, given.pairs if isinstance(given, Documents) else given)
        except ModelError as error:
            if not where_routed:
                raise
            log.warning("routing is left out: %s", error, extra={"weakens": "layers", "withheld": "how routing changed"})
            return {}

    return Stage(name="routing", work=work, inputs=(MODELS, texts))


def _measured(run: JobRun[Any], texts: Pairs) -> Tables:
    from mechscope.subject import pair
    from mechscope.weights import routing, routing_change

    models = run[MODELS]
    if "tuned" not in models:
        return _tables({label: routing(subject, texts, execution=run.execution) for label, subject in models.items()})
    both = pair(models["base"], models["tuned"], resize=getattr(run.settings, "resize", "refuse"))
    change = routing_change(both, texts, execution=run.execution)
    return {**_tables({"base": change.base, "tuned": change.tuned}), "routing_changes": change.layers, "expert_changes": change.experts}


def _tables(routed: Mapping[str, Routing]) -> Tables:
    import pandas as pd

    return {
        "routing": pd.concat([each.layers.assign(model=label) for label, each in routed.items()], ignore_index=True),
        "experts": pd.concat([each.experts.assign(model=label) for label, each in routed.items()], ignore_index=True),
    }
