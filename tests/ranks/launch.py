"""Several processes that run one function together, as a launcher starts them, but forked from a process that has everything imported."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

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


class Team:
    """Ranks that stay, and run one job after the other.

    Attributes:
        ended: Whether they are gone, as they are when a job failed: the others may wait for ever for the one that did.
    """

    def __init__(self, size: int) -> None:
        """Start them."""
        port, self.ended = _free_port(), False
        self._ranks: list[tuple[Any, Connection]] = []
        for rank in range(size):
            here, there = _context.Pipe()
            process = _context.Process(target=_serve, args=(rank, size, port, there), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a job on every rank and return what each of them returned.

        Raises:
            AssertionError: One of them failed.
        """
        for _, connection in self._ranks:
            connection.send((job, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + _SECONDS
        while len(results) < len(self._ranks):
            for rank, (process, connection) in enumerate(self._ranks):
                if rank in results or not connection.poll(0.01):
                    late = time.monotonic() > deadline or not process.is_alive()
                    if rank not in results and late and not connection.poll():
                        self._fail(f"rank {rank} did not answer (exit code {process.exitcode})")
                    continue
                error, results[rank] = connection.recv()
                if error:
                    self._fail(f"rank {rank}: {error}")
        return [results[rank] for rank in range(len(self._ranks))]

    def end(self) -> None:
        """End them."""
        self.ended = True
        for process, connection in self._ranks:
            process.terminate()
            process.join()
            connection.close()

    def _fail(self, message: str) -> NoReturn:
        self.end()
        raise AssertionError(message)


class _Silent:
    """A pipe that was closed."""

    def poll(self) -> bool:
        """Return that nothing is there."""
        return False


def _serve(rank: int, size: int, port: int, connection: Connection) -> None:
    _join(rank, size, port)
    while True:
        job, args = connection.recv()
        answer: tuple[str | None, Any]
        try:
            answer = (None, job(*args))
        except Exception:
            answer = (traceback.format_exc(), None)
        connection.send(answer)


def _run(rank: int, size: int, port: int, sender: Connection, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    _join(rank, size, port)
    sender.send(job(*args))
    torch.distributed.destroy_process_group()


def _join(rank: int, size: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update(address | {name: str(number) for name, number in numbers.items()})


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def files(folder: Path) -> set[str]:
    """Return what lies in a folder, by relative path."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
