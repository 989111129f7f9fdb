"""Launches of the CUDA kernels, over a stand-in for CUDA's runtime: what a device would refuse is not asked of it."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


class Launched(NamedTuple):
    blocks: int
    parts: int
    cluster: int
    shared: int


Launch = Callable[..., Launched | None]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """How a call was launched, or None. Kinds of calls know nothing of each other, and a test has its own."""
    library = tmp_path_factory.mktemp("csrc") / "launches.so"
    flags = ["-std=c++20", "-O0", "-DFASTKD_SIMT", "-fPIC", "-shared", "-x", "c++"]
    folders = [f"-I{folder}" for folder in (HERE / "runtime", HERE, CSRC)]
    subprocess.run(["g++", *flags, *folders, str(HERE / "launches.cpp"), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).launch_rows
    function.restype = ctypes.c_bool

    def call(kind: int, rows: int, vectors: int, captured: bool = False, sms: int = 132) -> Launched | None:
        how = (ctypes.c_int * 4)()
        sizes = ctypes.c_int64(rows), ctypes.c_int64(vectors), ctypes.c_bool(captured)
        return Launched(*how) if function(kind, *sizes, sms, how) else None

    return call


def test_lengths_in_turn(launch: Launch) -> None:
    """Rows that take more shared memory, and less, and more again: the grid was chosen before."""
    launched = [launch(0, 4096, vectors) for vectors in (65538, 32002, 16034, 4002, 40) * 2]
    assert all(launched), launched
    assert [one.cluster for one in launched if one] == [16, 16, 8, 2, 1] * 2
    assert launched[:5] == launched[5:]
    assert max(one.shared for one in launched if one) > 48 << 10


def test_parts_that_cannot_run_at_once(launch: Launch) -> None:
    """A row that is too long to be kept has several blocks; one where these were refused."""
    assert launch(1, 4, 10**6) == Launched(4, 32, 1, 0)
    assert launch(1, 4, 10**6, sms=100) == Launched(4, 1, 1, 0)


def test_a_first_call_is_not_captured(launch: Launch) -> None:
    assert launch(2, 4096, 4002, captured=True) is None
    first = launch(2, 4096, 4002)
    assert first and launch(2, 4096, 4002, captured=True) == first
    assert launch(2, 4096, 16034, captured=True) is None  # another length chooses a grid
    assert launch(3, 4096, 4002, captured=True) is None
