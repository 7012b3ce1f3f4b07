"""The study of one paper (arXiv 2505.17073, called paper 1): its claims beside what was measured, and the settings and inputs of the study around it.

Light at import, so that jobs can name the stage of the claims.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mechscope.studies.job import Stage
from mechscope.studies.run import JobRun, Tables


def claims_stage(*after: Stage) -> Stage:
    """Return the stage that judges the paper's claims.

    Args:
        after: Stages whose tables are read, as far as claims need them.
    """

    def judge(run: JobRun[Any]) -> Tables:
        from mechscope.studies.paper_2505_17073.claims import NEEDED, claims_table

        # a stage that this run leaves out may have left tables of other settings in the folder
        stages = [run.folder.manifest["stages"][stage.name]["outputs"] for stage in after if stage.when(run.settings)]
        written = {Path(name).stem for outputs in stages for name in outputs}
        tables = run.tables([name for name in NEEDED if name in written])
        return {"claims": claims_table(tables, rows=run.settings.rows, rule=run.settings.layer_rule)}

    return Stage(name="claims", work=judge, hangs_on=("rows", "layer_rule"), after=after, alone=True)
