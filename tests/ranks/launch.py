"""Several processes that run one function together, as a launcher starts them, but forked from a process that has everything imported."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ranks.jobs"])
# longest that a test's ranks may take together
_SECONDS = 300


def together(size: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """Run a job on several ranks and return what each of them returned.

    Raises:
        AssertionError: One of them failed.
    """
    codes, found = ended(size, job, *args)
    assert codes == [0] * size, f"exit codes {codes}"
    return found


def ended(size: int, job: Callable[..., Any], *args: Any) -> tuple[list[int], list[Any]]:
    """Run a job on several ranks; when one of them dies, end the others as a launcher does.

    Returns:
        Exit codes (negative: ended by that signal), and what each rank returned (None where it did not).
    """
    port = _free_port()
    ranks: list[tuple[Any, Any]] = []
    for rank in range(size):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_run, args=(rank, size, port, sender, job, args))
        process.start()
        sender.close()
        ranks.append((process, receiver))
    found: list[Any] = [None] * size
    deadline = time.monotonic() + _SECONDS
    while any(process.is_alive() for process, _ in ranks):
        for rank, (_, receiver) in enumerate(ranks):
            if receiver.poll():
                try:
                    found[rank] = receiver.recv()
                except EOFError:
                    receiver.close()
                    ranks[rank] = (ranks[rank][0], _Silent())
        failed = any(not process.is_alive() and process.exitcode for process, _ in ranks)
        if failed or time.monotonic() > deadline:
            for process, _ in ranks:
                process.terminate()
                process.join()
        time.sleep(0.01)
    for rank, (process, receiver) in enumerate(ranks):
        process.join()
        if receiver.poll():
            try:
                found[rank] = receiver.recv()
            except EOFError:
                continue
    return [int(process.exitcode or 0) for process, _ in ranks], found


class _Silent:
    """A pipe that was closed."""

    def poll(self) -> bool:
        """Return that nothing is there."""
        return False


def _run(rank: int, size: int, port: int, sender: Connection, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update(address | {name: str(number) for name, number in numbers.items()})
    sender.send(job(*args))
    torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def files(folder: Path) -> set[str]:
    """Return what lies in a folder, by relative path."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
