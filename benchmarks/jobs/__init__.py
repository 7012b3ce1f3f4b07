"""mechscope's own jobs, by topic."""

from __future__ import annotations

from benchmarks.harness import Job
from benchmarks.jobs import adapters, attention, circuits, documents, features, graphs, heads, interventions, lenses, probes, walks, weights

TOPICS: dict[str, tuple[Job, ...]] = {
    "attention": attention.JOBS,
    "walks": walks.JOBS,
    "interventions": interventions.JOBS,
    "circuits": circuits.JOBS,
    "lenses": lenses.JOBS,
    "heads": heads.JOBS,
    "weights": weights.JOBS,
    "probes": probes.JOBS,
    "features": features.JOBS,
    "graphs": graphs.JOBS,
    "adapters": adapters.JOBS,
    "documents": documents.JOBS,
}
JOBS: dict[str, Job] = {job.name: job for jobs in TOPICS.values() for job in jobs}


def topic_of(name: str) -> str:
    """Return the topic of a job."""
    return next(topic for topic, jobs in TOPICS.items() if any(job.name == name for job in jobs))
