"""``python -m fastkd cache info PATH`` and ``python -m fastkd cache verify PATH``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd import __main__, cache
from tests.cache.sequences import SETTINGS, write


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mass kept: of three tokens 0.3, 0.95 and 1, padding's being nothing."""
    probs = torch.tensor([[0.2, 0.1, 0.0], [0.5, 0.25, 0.2], [1.0, 0.5, 0.0]])
    ids = torch.tensor([[4, 2, 0], [1, 2, 3], [5, -1, 0]])
    with cache.Writer(tmp_path, **SETTINGS, dtype=torch.float32) as writer:
        writer.add(torch.tensor([1, 2, 3]), fastkd.TopK(ids, probs.log(), 2.0))
    assert __main__.main(["cache", "info", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = (tmp_path / "shard-0-000000.safetensors").stat().st_size
    assert lines[:4] == [
        "1 sequences, 3 tokens, 1 shards",
        "k = 3 of 50, T = 2, bucket, of a teacher",
        f"{size} bytes, {size / 3:.1f} a token: ids uint16, log-probabilities float32",
        "mass kept, mean 0.7500",
    ]
    bars = {line[:17].strip(): (line.count("#"), line.split()[-1]) for line in lines[4:]}
    assert len(bars) == 7
    assert bars.pop("0.0% to  50.0%") == (40, "33.3%")
    assert bars.pop("99.9% to 100.0%") == (40, "33.3%")
    # 0.95 lies on an edge, where float32 puts it on either side.
    assert sorted(bars.values()) == [(0, "0.0%")] * 4 + [(40, "33.3%")]


def test_info_of_a_cache_that_is_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, [1, 3, 5], rank=1, world_size=2)
    assert __main__.main(["cache", "info", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("0 sequences, and 3 past the first that is missing, 18 tokens, ")
    write(tmp_path, [], rank=0, world_size=2)
    assert __main__.main(["cache", "verify", str(tmp_path)]) == 0


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is damaged is named, and what is not is looked at all the same."""
    write(tmp_path, range(6))
    assert __main__.main(["cache", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "6 sequences, all as they were written"
    (tmp_path / "shard-0-000001.safetensors").write_bytes(b"")
    assert __main__.main(["cache", "verify", str(tmp_path)]) == 1
    first, second, third, last = capsys.readouterr().out.splitlines()
    assert first.startswith("shard-0-000000.safetensors  3 sequences, ")
    assert first.endswith(" bytes, whole")
    assert second.startswith(f"{tmp_path}/shard-0-000001.safetensors: has 0 bytes, the index says ")
    assert third.endswith(" bytes, whole")
    assert last == "1 damaged"
    assert __main__.main(["cache", "info", str(tmp_path)]) == 1
    assert "shard-0-000001.safetensors: has 0 bytes" in capsys.readouterr().err


def test_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, and cleared from it in the end."""
    write(tmp_path, range(3))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert __main__.main(["cache", "verify", str(tmp_path)]) == 0
    shown = capsys.readouterr().err
    assert "shard-0-000000.safetensors, 33%" in shown
    assert shown.endswith("\r\033[K\r")
    assert __main__.main(["cache", "info", str(tmp_path)]) == 0
    assert "shard 1 of 1, 67%" in capsys.readouterr().err


def test_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("info", "verify"):
        assert __main__.main(["cache", action, str(tmp_path)]) == 2
        assert f"{tmp_path}: there is no cache" in capsys.readouterr().err


def test_without_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, and the import, say what to install."""
    for name in [name for name in sys.modules if name.startswith("fastkd.cache")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(fastkd, "cache")
    monkeypatch.setattr("fastkd._extras.find_spec", lambda name: None if name == "safetensors" else True)
    assert __main__.main(["cache", "info", "anywhere"]) == 2
    assert "fastkd.cache needs safetensors: pip install safetensors" in capsys.readouterr().err
