"""Writers that die of SIGKILL, and the cache that each leaves: ``python -m tests.cache.killed MODE FOLDER``.

Forked from a process that has imported everything, so that a writer costs milliseconds. ``operations`` kills before
each operation on files and within each write, in turn; ``moments`` after random times.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

from fastkd import cache
from fastkd.cache import shard
from tests.cache.sequences import SETTINGS, check, sequence


def write(folder: Path, sequences: int, report: int) -> None:
    """Go on with the cache; tell through the pipe how many sequences are on disk, after each shard."""
    with cache.Writer(folder, **SETTINGS, shard_bytes=100) as writer:
        for number in range(len(writer), sequences):
            shards = len(list(cache.Cache(folder).shards()))
            writer.add(*sequence(number))
            if len(list(cache.Cache(folder).shards())) > shards:
                os.write(report, bytes([len(cache.Cache(folder))]))


def run(folder: Path, sequences: int, prepare: Callable[[], None], seconds: float | None) -> bool:
    """Have a process write, and kill it after a time unless it ends before; whether it came to the end.

    What it said to be on disk is, bit for bit, and nothing twice.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            prepare()
            write(folder, sequences, writing)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    os.close(writing)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    said = b""
    while piece := os.read(reading, 4096):
        said += piece
    os.close(reading)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the writer failed"
    if list(folder.glob("index-*.json")):
        found = cache.Cache(folder)
        assert len(found) == sum(entry.sequences for entry in found.shards()) <= sequences
        assert len(found) >= max(said, default=0), "what was on disk is lost"
        for number, (_, topk) in enumerate(found):
            check(topk, number)
    else:
        assert not said
    return not os.WIFSIGNALED(status)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(operation: int) -> Callable[[], None]:
    """Patches for a writer that dies before the given operation on files; within it, if that is a write."""

    def prepare() -> None:
        operations = count()

        def patch(owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def patched(*arguments: Any, **keywords: Any) -> Any:
                if next(operations) == operation:
                    die()
                return original(*arguments, **keywords)

            setattr(owner, name, patched)

        def patch_write(owner: Any, name: str, path_first: bool) -> None:
            original = getattr(owner, name)

            def patched(first: Any, second: Any) -> Any:
                original(first, second)
                path = first if path_first else second
                if next(operations) == operation:
                    os.truncate(path, random.randrange(path.stat().st_size))
                    die()

            setattr(owner, name, patched)

        patch(os, "fsync")
        patch(os, "replace")
        patch_write(Path, "write_text", path_first=True)
        patch_write(shard, "save_file", path_first=False)

    return prepare


def kill_at_operations(folder: Path) -> int:
    """Every operation of a writer of three shards; each is then resumed to the end."""
    for operation in count():
        inside = folder / str(operation)
        inside.mkdir()
        if run(inside, 6, dying_at(operation), None):
            return operation
        assert run(inside, 6, lambda: None, None)
        assert len(cache.Cache(inside)) == 6
    raise AssertionError


def kill_at_moments(folder: Path, least: int = 30, sequences: int = 30) -> int:
    """A writer killed and resumed until it comes to the end, again and again."""
    start = time.perf_counter()
    assert run(folder / "timed", sequences, lambda: None, None)
    whole = time.perf_counter() - start
    kills = 0
    while kills < least:
        inside = folder / str(kills)
        longest = whole / 6
        while not run(inside, sequences, lambda: None, random.uniform(0, longest)):
            kills += 1
            longest *= 1.1  # a machine that is slower than when it was timed comes to the end too
        assert len(cache.Cache(inside)) == sequences
    return kills


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not survive a fork
    random.seed(0)
    os.fsync = lambda descriptor: None  # which costs most of the time, and changes nothing for who is killed
    mode = {"operations": kill_at_operations, "moments": kill_at_moments}[sys.argv[1]]
    print(mode(Path(sys.argv[2])))
