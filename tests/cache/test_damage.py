"""A file that is not what was written is found, by ``verify`` and by reading, and named; others stay readable."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastkd import cache
from fastkd.cache import command
from tests.cache.sequences import check, write

COUNT = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, range(COUNT))
    assert len(list(tmp_path.glob("shard-*"))) == 3
    return tmp_path


def unreadable(folder: Path, damaged: Path) -> list[int]:
    """The sequences that cannot be read, the damaged file's alone. Others are as they were written."""
    found = cache.Cache(folder)
    wrong = []
    for number in range(COUNT):
        try:
            check(found[number][1], number)
        except cache.DamagedFileError as error:
            assert str(error).startswith(f"{damaged}: ")
            wrong.append(number)
    return wrong


def flips(data: bytes) -> Iterator[bytes]:
    """One bit of each byte."""
    for place in range(len(data)):
        yield data[:place] + bytes([data[place] ^ (1 << random.randrange(8))]) + data[place + 1 :]


def truncations(data: bytes) -> Iterator[bytes]:
    for size in (*range(0, len(data), 7), len(data) - 1):
        yield data[:size]
    yield data + b"\0"


@pytest.mark.parametrize("damages", [flips, truncations])
def test_a_shard(folder: Path, damages, capsys: pytest.CaptureFixture[str]) -> None:
    """In its header, its head and its data."""
    random.seed(0)
    path = folder / "shard-0-000001.safetensors"
    whole = path.read_bytes()
    seen = set()
    for number, data in enumerate(damages(whole)):
        path.write_bytes(data)
        wrong = unreadable(folder, path)
        assert wrong, number
        assert set(wrong) <= {3, 4}
        seen.add(tuple(wrong))
        if number % 20 == 0:
            assert command.run("verify", folder) == 1
            assert f"{path}: " in capsys.readouterr().out
    # A sequence's own data keeps nobody from reading its neighbour.
    assert seen == ({(3, 4), (3,), (4,)} if damages is flips else {(3, 4)})


@pytest.mark.parametrize("damages", [flips, truncations])
def test_an_index(folder: Path, damages, capsys: pytest.CaptureFixture[str]) -> None:
    random.seed(0)
    path = folder / "index-0.json"
    whole = path.read_bytes()
    for number, data in enumerate(damages(whole)):
        path.write_bytes(data)
        with pytest.raises(cache.DamagedFileError, match=f"{path}: "):
            cache.Cache(folder)
        if number % 20 == 0:
            assert command.run("verify", folder) == 1
            assert f"{path}: " in capsys.readouterr().err


@pytest.mark.parametrize("other", ["nothing", "text", "another shard", "no file"])
def test_a_foreign_shard(folder: Path, other: str) -> None:
    path = folder / "shard-0-000001.safetensors"
    if other == "another shard":
        shutil.copy(folder / "shard-0-000000.safetensors", path)
    elif other == "no file":
        path.unlink()
    else:
        path.write_text({"nothing": "", "text": "a" * path.stat().st_size}[other])
    assert unreadable(folder, path) == [3, 4]


@pytest.mark.parametrize("text", ["", "[]", "{}", "no JSON", '{"format": "another"}', '"fastkd.cache"', "\0\0\0"])
def test_a_foreign_index(folder: Path, text: str) -> None:
    path = folder / "index-0.json"
    path.write_text(text)
    with pytest.raises(cache.DamagedFileError, match=f"{path}: is no index of a cache"):
        cache.Cache(folder)
    with pytest.raises(cache.DamagedFileError, match=f"{path}: is no index of a cache"):
        write(folder, [])  # a writer does not take it for a cache to begin


def test_an_index_of_another_cache(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("other")
    write(elsewhere, [1], rank=1, world_size=2)
    shutil.copy(elsewhere / "index-1.json", folder)
    with pytest.raises(cache.DamagedFileError, match=r"index-1.json: is of another cache than index-0.json"):
        cache.Cache(folder)
    (folder / "index-1.json").unlink()
    shutil.copy(folder / "index-0.json", folder / "index-1.json")
    with pytest.raises(cache.DamagedFileError, match=r"index-1.json: is of another cache than index-0.json"):
        cache.Cache(folder)


def test_an_index_of_a_newer_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr("fastkd.cache.format.VERSION", 2)
        shutil.rmtree(folder)
        write(folder, [0])
    assert json.loads((folder / "index-0.json").read_text())["version"] == 2
    with pytest.raises(cache.DamagedFileError, match=r"index-0.json: is of version 2, this fastkd reads version 1"):
        cache.Cache(folder)
