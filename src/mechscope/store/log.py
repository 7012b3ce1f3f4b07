"""The run's log: `log.jsonl`, one JSON object per event (time, stage, level, message, data).

mechscope's modules log through `logging` as any library does; while a run is open, a handler copies the records of `mechscope.*` into the
file. Data goes in by `logger.info(message, extra={"data": {...}})`. Each event is one appended write, so a kill costs at most half a line,
and a reader passes over half lines.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mechscope.store.files import refusal

_LIBRARY = logging.getLogger("mechscope")


class RunLog(logging.Handler):
    """Writes the records of `mechscope.*`, from INFO on, to a run's `log.jsonl` between `attach` and `close`.

    Attributes:
        stages: the names of the stages being run, outermost first; events carry the last one.
    """

    def __init__(self, path: Path) -> None:
        """Open the file for appending; `RunError` where it cannot be written."""
        super().__init__(logging.INFO)
        self.stages: list[str] = []
        self._level_before = _LIBRARY.level
        try:
            self._file = path.open("ab+", buffering=0)
            # end the half line that a killed process left, or the next event would be lost with it
            if self._file.tell():
                self._file.seek(-1, os.SEEK_END)
                if self._file.read(1) != b"\n":
                    self._file.write(b"\n")
        except OSError as error:
            raise refusal(path, error) from error

    def attach(self) -> None:
        """Begin to receive mechscope's log records."""
        self._level_before = _LIBRARY.level
        # unset, the root's WARNING would hold back what a log is for
        if not _LIBRARY.isEnabledFor(logging.INFO):
            _LIBRARY.setLevel(logging.INFO)
        _LIBRARY.addHandler(self)

    def close(self) -> None:
        """Stop receiving, put the logger's level back and close the file."""
        if self in _LIBRARY.handlers:
            _LIBRARY.removeHandler(self)
            _LIBRARY.setLevel(self._level_before)
        self._file.close()
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """Append one record."""
        try:
            data = dict(getattr(record, "data", {}))
            if record.exc_info and record.exc_info[1]:
                data["exception"] = repr(record.exc_info[1])
            event = {
                "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
                "stage": self.stages[-1] if self.stages else None,
                "level": record.levelname.lower(),
                "message": record.getMessage(),
                "data": data,
            }
            self._file.write(json.dumps(event, ensure_ascii=False, default=str).encode() + b"\n")
        except Exception:
            self.handleError(record)
        # logging shows warnings on stderr only where no handler exists; this handler must not silence them
        alone = _LIBRARY.handlers == [self] and not logging.getLogger().handlers
        if alone and logging.lastResort and record.levelno >= logging.lastResort.level:
            logging.lastResort.handle(record)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the events of a `log.jsonl` in order; lines torn by a kill are passed over, a missing file has none."""
    events = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return [event for event in events if isinstance(event, dict)]
