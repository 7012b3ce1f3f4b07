"""One writer per folder.

A lock on a small file that the operating system lets go when the process ends, however it ends: a killed process leaves nothing to clean up.
The file also marks a folder as mechscope's from the first moment of its making.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from mechscope.errors import RunError
from mechscope.store.files import refusal

logger = logging.getLogger(__name__)

LOCK = ".mechscope.lock"

_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


def hold(folder: Path) -> BaseFileLock:
    """Take the folder's lock; `release` lets it go.

    Raises:
        RunError: another process (or another writer in this one) holds it, or the folder is not writable.
    """
    file = folder / LOCK
    # not the marker file that filelock falls back to: one that a killed process leaves would refuse the folder for ever
    lock = FileLock(file, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
        file.write_text(str(os.getpid()))
    except Timeout as error:
        holder = file.read_text(errors="replace") or "unknown"
        raise RunError(f"{folder} is being written by process {holder}: wait for it to end, or choose another folder with --out") from error
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            lock.release()
            raise refusal(folder, error) from error
        logger.warning("%s is on a file system without locks: start no second run on it", folder)
    return lock
