"""``python -m fastkd cache info PATH`` and ``python -m fastkd cache verify PATH``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastkd.cache.format import DamagedFileError
from fastkd.cache.reader import Cache
from fastkd.cache.shard import Stored, padding

# Of the mass kept, a token's sum over its k: below half, to half, ..., to 99.9 %, above. float16 may round it above 1.
EDGES = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
BAR = 40  # characters


def run(action: str, path: Path) -> int:
    """Print what was asked for; the exit status: 1 if a file is damaged, 2 if there is no cache."""
    try:
        cache = Cache(path)
        return {"info": info, "verify": verify}[action](cache)
    except FileNotFoundError as error:
        print(f"python -m fastkd cache: {error}", file=sys.stderr)
        return 2
    except DamagedFileError as error:
        print(error, file=sys.stderr)
        return 1


def info(cache: Cache) -> int:
    """Counts, settings, bytes, and how much of the teacher's mass the k tokens have."""
    header, shards = cache.header, list(cache.shards())
    tokens, size = sum(shard.tokens for shard in shards), sum(shard.bytes for shard in shards)
    each = size / max(tokens, 1)
    ranks = f", {header.world_size} writers" if header.world_size > 1 else ""
    sequences = sum(shard.sequences for shard in shards)
    beyond = f", and {sequences - len(cache)} past the first that is missing" if sequences > len(cache) else ""
    print(f"{len(cache):,} sequences{beyond}, {tokens:,} tokens, {len(shards):,} shards{ranks}")
    print(f"k = {header.k} of {header.vocab_size:,}, T = {header.temperature:g}, {header.tail}, of {header.teacher}")
    print(f"{size:,} bytes, {each:.1f} a token: ids {header.ids}, log-probabilities {header.log_probs}")
    counts, total = np.zeros(len(EDGES) + 1, np.int64), 0.0
    for number, shard in enumerate(shards):
        for position in range(shard.sequences):
            _progress(f"shard {number + 1} of {len(shards)}, {position / shard.sequences:.0%}")
            mass = _mass(cache.open(shard).read(position))
            counts += np.bincount(np.digitize(mass, EDGES), minlength=len(counts))
            total += float(mass.sum())
    _progress("")
    print(f"mass kept, mean {total / max(tokens, 1):.4f}")
    most = max(int(counts.max()), 1)
    for low, high, count in zip((0.0, *EDGES), (*EDGES, 1.0), counts.tolist(), strict=True):
        print(f"{low:6.1%} to {high:6.1%}  {'#' * round(BAR * count / most):<{BAR}}  {count / max(tokens, 1):6.1%}")
    return 0


def _mass(found: Stored) -> NDArray[Any]:
    """(tokens,)"""
    probs = np.exp(found.log_probs.astype(np.float32))
    probs[found.ids == padding(found.ids)] = 0
    mass: NDArray[Any] = probs.sum(-1)
    return mass


def verify(cache: Cache) -> int:
    """Read all of it: a line a shard, or what is wrong with it."""
    damaged = 0
    for shard in cache.shards():
        try:
            for position in range(shard.sequences):
                _progress(f"{shard.file}, {position / shard.sequences:.0%}")
                cache.open(shard).read(position)
            _progress("")
            print(f"{shard.file}  {shard.sequences:,} sequences, {shard.bytes:,} bytes, whole", flush=True)
        except DamagedFileError as error:
            _progress("")
            print(error, flush=True)
            damaged += 1
    print(f"{damaged} damaged" if damaged else f"{len(cache):,} sequences, all as they were written")
    return int(damaged > 0)


def _progress(text: str) -> None:
    """What is under way, on a terminal's last line."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)
