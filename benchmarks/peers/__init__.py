"""The same jobs by others: Hugging Face alone, peft, TransformerLens, nnsight, the code of EAP-IG's authors, circuit-tracer, SAELens, sparsify.

They run in processes of their own, under a Python that has them, on the very weights and texts of mechscope's jobs; what wrapping a model takes is
not counted. Their numbers are compared with mechscope's, so that a peer's job provably does the same work. Nothing of mechscope is imported here, and
a peer's package only where its job runs.
"""

from __future__ import annotations

from benchmarks.harness import Job
from benchmarks.peers import circuit_tracer, dictionaries, eap, huggingface, nnsight, transformer_lens

NAMES = {
    "transformers": huggingface.BY,
    "peft": huggingface.PEFT,
    "transformer_lens": transformer_lens.BY,
    "nnsight": nnsight.BY,
    "eap": eap.BY,
    "circuit_tracer": circuit_tracer.BY,
    "sae_lens": dictionaries.SAELENS,
    "sparsify": dictionaries.SPARSIFY,
}
_JOBS = (*huggingface.JOBS, *transformer_lens.JOBS, *nnsight.JOBS, *eap.JOBS, *circuit_tracer.JOBS, *dictionaries.JOBS)
JOBS: dict[tuple[str, str], Job] = {(job.name, job.by): job for job in _JOBS}
