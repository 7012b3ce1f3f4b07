"""One run of a job, as its stages see it: settings, what is loaded on first use, the run folder, and the stage that is being done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mechscope.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

    from mechscope.instrument import Execution, Progress
    from mechscope.store.run import RunFolder
    from mechscope.store.stage import Stage as StoredStage
    from mechscope.subject import Subject

S = TypeVar("S", bound=Settings)
T = TypeVar("T")
Tables = Mapping[str, "pd.DataFrame"]


@dataclass(frozen=True, eq=False)
class Input(Generic[T]):
    """Something that a job loads: models, documents, prompt pairs.

    Attributes:
        name: Its name in the inputs of stages.
        load: Loads it, by the run's settings.
        fingerprint: What of it decides a result; JSON-able.
        record: What the manifest keeps of it: entries at its top level.
    """

    name: str
    load: Callable[[JobRun[Any]], T]
    fingerprint: Callable[[T], Any]
    record: Callable[[T], Mapping[str, Any]] = lambda value: {}


class JobRun(Generic[S]):
    """One run of a job: settings, what was loaded, the run folder, and the stage that is being done.

    Attributes:
        settings: The job's settings.
        folder: The run folder.
        label: In a stage that is done for each model: which one.
    """

    def __init__(
        self,
        settings: S,
        folder: RunFolder,
        *,
        first: Callable[[JobRun[S]], Subject],
        progress: Progress | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a run in an open folder.

        Args:
            settings: The job's settings.
            folder: The run folder, open for writing.
            first: Returns the model whose tokenizer and longest text count.
            progress: Called with a label, what is done and how much there is.
            given: Models and documents in memory, by the name of the setting that would name their source.
        """
        self.settings = settings
        self.folder = folder
        self.label = ""
        self._first = first
        self._progress = progress
        self._given = dict(given or {})
        self._loaded: dict[Input[Any], Any] = {}
        self._stage: StoredStage | None = None

    def __getitem__(self, wanted: Input[T]) -> T:
        """Return an input; it is loaded and recorded on first use."""
        if wanted not in self._loaded:
            value = self._loaded[wanted] = wanted.load(self)
            for key, entry in wanted.record(value).items():
                self.folder.record(key, entry)
        return self._loaded[wanted]

    def has(self, wanted: Input[Any]) -> bool:
        """Tell whether an input was loaded."""
        return wanted in self._loaded

    def source(self, name: str) -> Any:
        """Return what a setting names: an object in memory where one was given, else the setting."""
        return self._given.get(name, getattr(self.settings, name))

    @property
    def given(self) -> Mapping[str, Any]:
        """Models and documents in memory, by the setting that would name their source."""
        return self._given

    @property
    def first(self) -> Subject:
        """The model whose tokenizer and longest text count."""
        return self._first(self)

    @property
    def execution(self) -> Execution:
        """Tokens of a batch, seed and progress, for the techniques."""
        from mechscope.instrument import Execution

        tokens, seed = getattr(self.settings, "tokens_per_batch", None), getattr(self.settings, "seed", 0)
        return Execution(tokens_per_batch=tokens, seed=seed, progress=self._progress)

    @property
    def stage(self) -> StoredStage:
        """The stage that is being done, for outputs other than tables."""
        if self._stage is None:
            raise RuntimeError("no stage is being done")
        return self._stage

    def table(self, name: str) -> pd.DataFrame:
        """Read a table that an earlier stage wrote."""
        return self.folder.table(name)

    def tables(self, names: Sequence[str]) -> dict[str, pd.DataFrame]:
        """Read those of some tables that earlier stages wrote."""
        return {name: self.folder.table(name) for name in names if self.folder.has_table(name)}

    def tell(self, label: str, done: int, total: int) -> None:
        """Say how far work is."""
        if self._progress is not None:
            self._progress(label, done, total)
