"""A cache of a teacher beside plain files of the same bytes: ``python -m fastkd.bench.cache [--out FILE.json]``.

Reading is held against copying the same sequences, in the same random order and batches, out of a memory map; from
memory, and from a disk whose cached pages were dropped before. Writing is held against writing the bytes to disk
(``fsync``), and against their checksum alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import fastkd
from fastkd import cache
from fastkd.bench import run
from fastkd.cache.format import checksum

ROUNDS, BATCH = 9, 16
PLAIN, CACHE, FIRST = "plain memory map", "cache", "cache, first read"
DISK = "from disk: "
FILE, CHECKSUM = "plain file, to disk", "checksum alone"


class Shape(NamedTuple):
    k: int
    vocab: int
    length: int = 1024
    sequences: int = 256

    @property
    def name(self) -> str:
        return f"K = {self.k}, {self.sequences} x {self.length} tokens, {self.vocab} ids"


class Call(NamedTuple):
    """What is timed, and what is done before it, untimed."""

    call: Callable[[], object]
    before: Callable[[], object] = lambda: None


SHAPES = (Shape(64, 32000), Shape(64, 128256), Shape(8, 128256))


def calls(shape: Shape, folder: Path) -> tuple[int, dict[str, Call], dict[str, Call]]:
    """How many bytes there are, and what reads and writes them."""
    generator = torch.Generator().manual_seed(0)
    rows = (shape.sequences, shape.length)
    tokens = torch.randint(shape.vocab, rows, generator=generator)
    ids = torch.randint(shape.vocab, (*rows, shape.k), generator=generator, dtype=torch.int32)
    topk = fastkd.TopK(ids, torch.rand(*rows, shape.k, generator=generator).div(shape.k).log().half())
    narrow = ids.numpy().astype(np.uint16 if shape.vocab < 2**16 else np.uint32)
    parts = (part.reshape(shape.sequences, -1).view(np.uint8) for part in (narrow, topk.log_probs.numpy()))
    data = np.concatenate([*parts], 1)  # a row a sequence
    order = torch.randperm(shape.sequences, generator=generator).split(BATCH)
    stored, plain = folder / "cache", folder / "plain"

    def write_cache() -> None:
        with cache.Writer(stored, k=shape.k, temperature=1.0, vocab_size=shape.vocab, teacher="random") as writer:
            for numbers in order:
                batch = slice(len(writer), len(writer) + len(numbers))
                writer.add(tokens[batch], topk._replace(ids=topk.ids[batch], log_probs=topk.log_probs[batch]))

    def write_plain() -> None:
        with plain.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def remove() -> None:
        shutil.rmtree(stored, ignore_errors=True)

    def drop() -> None:
        for path in (plain, *stored.iterdir()):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def read_plain() -> None:
        source = np.memmap(plain, np.uint8, "r", shape=data.shape)
        for numbers in order:
            found = torch.empty(len(numbers), data.shape[1], dtype=torch.uint8).numpy()
            for row, number in zip(found, numbers.tolist(), strict=True):
                row[:] = source[number]

    def read_cache(found: cache.Cache) -> None:
        for numbers in order:
            found.batch(numbers, tokens[numbers])

    write_cache()
    write_plain()
    opened = cache.Cache(stored)
    read_cache(opened)

    def read_first() -> None:
        read_cache(cache.Cache(stored))

    reads = {
        PLAIN: Call(read_plain),
        CACHE: Call(lambda: read_cache(opened)),
        FIRST: Call(read_first),
        DISK + PLAIN: Call(read_plain, drop),
        DISK + FIRST: Call(read_first, drop),
    }
    writes = {
        FILE: Call(write_plain),
        CHECKSUM: Call(lambda: checksum(data)),
        CACHE: Call(write_cache, remove),
    }
    return data.nbytes, reads, writes


def measure(shape: Shape, rounds: int = ROUNDS) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=".") as folder:  # a disk, where /tmp may be memory
        size, *both = calls(shape, Path(folder))
        samples: list[dict[str, list[float]]] = [{name: [] for name in found} for found in both]
        for _ in range(rounds):
            for found, into in zip(both, samples, strict=True):
                for name, (call, before) in found.items():
                    before()
                    start = time.perf_counter()
                    call()
                    into[name].append(time.perf_counter() - start)
    return {"name": shape.name, "bytes": size, "reading": samples[0], "writing": samples[1]}


def table(results: dict[str, Any]) -> list[list[str]]:
    """Speeds of reading and of writing, as shares of the plain file's."""
    lines = [["", "GB/s", "of the plain file's speed"]]
    for case in results["cases"]:
        lines.append([f"**{case['name']}**", "", ""])
        for kind, plain in (("reading", PLAIN), ("writing", FILE)):
            seconds = {name: statistics.median(samples) for name, samples in case[kind].items()}
            for name, median in seconds.items():
                other = seconds[DISK + plain if name.startswith(DISK) else plain]
                share = "" if median is other else f"{other / median:.0%}"
                lines.append([f"{kind}: {name}", f"{case['bytes'] / median / 1e9:.2f}", share])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastkd.bench.cache", description=__doc__.partition(":")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker
    results: dict[str, Any] = {"machine": run.machine("cpu"), "cases": []}
    for shape in SHAPES:
        results["cases"].append(measure(shape))
        for line in table({"cases": results["cases"][-1:]})[1:]:
            print(f"{line[0]:48}{line[1]:>8}{line[2]:>8}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
