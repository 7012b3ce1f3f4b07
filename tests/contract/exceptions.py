"""What is no claim of the contract for a technique, and why."""

from __future__ import annotations

from tests.contract.entries.weights import OF_WEIGHTS

# run on a family of their own
OF_FAMILY = dict.fromkeys(
    ("routing", "change of routing", "ablate experts", "patch experts"), "gpt_oss"
)  # which has experts, and weighs them in the model's own type

# no batches of texts: neither padding, nor halving, nor repetition
WITHOUT_BATCHES = {
    **dict.fromkeys(OF_WEIGHTS, "read from weights"),
    "compare weights": "read from weights",
    "attention patterns": "one document, whole",
    "attention edges": "one text, whole",
    "patchscope": "one text read in another",
    "attribution graph": "one prompt",
    "edit": "one fact",
}

# the result depends on what is batched together
OF_BATCHES = {
    "ablate by resampling": "values are drawn among the texts of a batch",
    "train das": "a step of training takes a batch",
    "das": "a step of training takes a batch",
    "prune": "a step of training takes a batch",
}

# memory that runs out is not met by halving the contract's batches of two texts
NOT_HALVED = {
    "ablate by resampling": "one text has no other to draw from",
    "head roles": "its own random texts are longer than a batch; their loop is that of `probes`",
    "train das": "a step of training takes a batch",
    "prune": "a step of training takes a batch",
}

# left in evaluation mode, as their docstrings say, and so their results are those of evaluation mode
EVALUATED = {"loss", "summaries"}

# what a family cannot do
NOT_RUN = {
    ("qwen3", name): "refused: no product of weights stands between a query and a key that are normed"
    for name in ("QK in tokens", "composition", "change of composition", "singular vectors", "scores by offset")
}

# public functions that run over texts and have no entry of their own
ELSEWHERE = {
    "bake_off": "trains arms into a folder: tests/adapt/test_bakeoff.py",
    "tune": "trains into a folder: tests/adapt/test_training.py, and shared among ranks in tests/ranks/test_ranks.py",
    "harvest": "writes into a folder, and an order of its own: tests/features/test_harvest.py",
    "train": "trains on activations, not on texts: tests/features/test_trainer.py",
    "train_end_to_end": "a step of training takes a batch, into a folder: tests/features/test_end_to_end.py",
    "shift": "fits probes on labelled texts: tests/features/test_shift.py; what it reads of the model stands in an entry",
    "edit_alone": "standing before and after edits: tests/edit/test_measures.py",
    "edit_in_sequence": "standing after edits: tests/edit/test_measures.py",
    "kept_key_moments": "key_moments, kept in a folder: tests/edit/test_keys.py",
    "copying_roles": "a part of head_roles",
    "pattern_roles": "a part of head_roles",
    "entity_roles": "makes texts for a tokenizer, then roles_on",
    "task_roles": "makes texts for a tokenizer, then roles_on",
}
