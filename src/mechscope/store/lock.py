"""One writer per run folder.

A lock on a small file (`flock`) that the operating system lets go when the process ends, however it ends: a killed run leaves nothing to
clean up. The file also marks a folder as mechscope's from the first moment of its making.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from io import FileIO
from pathlib import Path

from mechscope.errors import RunError
from mechscope.store.files import refusal

logger = logging.getLogger(__name__)

LOCK = ".mechscope.lock"


def hold(folder: Path) -> FileIO:
    """Take the folder's lock; closing the returned file lets it go.

    Raises:
        RunError: another process (or another open `RunFolder` of this one) writes the run, or the folder is not writable.
    """
    try:
        file = FileIO(folder / LOCK, "a+")
    except OSError as error:
        raise refusal(folder, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().decode(errors="replace") or "unknown"
        file.close()
        raise RunError(f"{folder} is being written by process {holder}: wait for it to end, or choose another folder with --out") from error
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}:
            file.close()
            raise refusal(folder, error) from error
        logger.warning("%s is on a file system without locks: start no second run on it", folder)
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    return file
