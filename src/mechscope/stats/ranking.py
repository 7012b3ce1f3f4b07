"""One score from several measures of change, by ranks.

KL in nats, a cosine distance and a weight norm share no unit, so they are not added but ranked: each measure gives every head (or layer)
the share of the others it exceeds, 0 for the least changed and 1 for the most, and the combined score is the mean of these. Measures are
given equal weight because nothing in paper 1 (arXiv 2505.17073, "KL, entropy and magnitude together") says otherwise; a score is a
ranking aid, not evidence that a part matters.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import rankdata

HEAD_SCORE_COLUMNS = ("kl_base_tuned", "entropy_change", "z_cosine_distance", "write_change", "weight_change")
LAYER_SCORE_COLUMNS = (
    "kl_base_tuned",
    "entropy_change",
    "cosine_distance",
    "write_change_own",
    "mlp_write_change_own",
    "weight_change",
)


def combined_score(measures: Float[np.ndarray, "measures *batch n"]) -> Float[np.ndarray, "*batch n"]:
    """Return the mean over measures of each candidate's rank by absolute value, scaled to 0–1.

    Candidates that a measure cannot tell apart share their mean rank, so a measure that is the same for all gives 1/2 to all and decides
    nothing. NaN in any measure of a row of candidates makes the scores of that row NaN.

    Args:
        measures: Measures of change, stacked along the first axis; candidates along the last.
    """
    ranks = rankdata(np.abs(measures), axis=-1, nan_policy="propagate")
    n = ranks.shape[-1]
    scaled = (ranks - 1) / (n - 1) if n > 1 else np.where(np.isnan(ranks), np.nan, 0.5)
    return scaled.mean(axis=0)


def layer_score(layers: pd.DataFrame) -> pd.Series:
    """Return each layer's combined score of `LAYER_SCORE_COLUMNS`, the column `score`; one row per layer, for one kind of query rows."""
    measures = layers.loc[:, list(LAYER_SCORE_COLUMNS)].to_numpy(dtype=np.float64).T
    return pd.Series(combined_score(measures), index=layers.index, name="score")
