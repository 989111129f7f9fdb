"""The benchmark of the cache runs, and shows what it measured."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastkd.bench import cache


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="pages cannot be dropped here")
def test_every_call_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    case = cache.measure(cache.Shape(k=2, vocab=50, length=8, sequences=20), rounds=2)
    assert case["bytes"] == 20 * 8 * 2 * (2 + 2)
    assert {len(samples) for kind in ("reading", "writing") for samples in case[kind].values()} == {2}
    assert not list(tmp_path.iterdir())


def test_table() -> None:
    """Medians as speeds, and as shares of the plain file's."""
    reading = {cache.PLAIN: [1.0, 1.0, 9.0], cache.CACHE: [2.0], f"{cache.DISK}{cache.PLAIN}": [4.0],
               f"{cache.DISK}{cache.FIRST}": [5.0]}  # fmt: skip
    case = {"name": "a case", "bytes": 2e9, "reading": reading, "writing": {cache.FILE: [4.0], cache.CACHE: [8.0]}}
    assert cache.table({"cases": [case]})[1:] == [
        ["**a case**", "", ""],
        ["reading: plain memory map", "2.00", ""],
        ["reading: cache", "1.00", "50%"],
        ["reading: from disk: plain memory map", "0.50", ""],
        ["reading: from disk: cache, first read", "0.40", "80%"],
        ["writing: plain file, to disk", "0.50", ""],
        ["writing: cache", "0.25", "50%"],
    ]
