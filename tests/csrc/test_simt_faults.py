"""Faults planted in the CUDA kernels' source, each of which the shim must find.

A fault is a patch. Under the shim the patched kernels must stop with what ``says`` names, or give other results than
the kernels as they are.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.csrc.simt import CSRC, build

ROW, REDUCE, READER, VECTORS = "cuda/kd_rows.cuh", "cuda/reduce.cuh", "cuda/reader.cuh", "cuda/vec.cuh"
REST = "cuda/rest.cuh"
INIT = "    if (thread_rank() == 0) exchange.blocks.init(grid, block_rank());\n"
STAGE_1 = "            const RowState state"
NORMALISE = "            publish(task, [&] { kernel.normalise"
LAST = "        for_listed(reader, task, [&](int i, int column, int) { dz_row"
PARTS = "        return state_in<State>(places, lane, count());\n"
NOT_FINITE, OTHER, ORDER, GAP = "not finite", "other results", "the order matters", "a gap between rows was written"


class Fault(NamedTuple):
    name: str
    says: str  # a pattern
    edits: tuple[tuple[str, str, str], ...]  # (file, what is there once, what instead)


FAULTS = (
    Fault(
        "the kernel's start is no barrier",
        "a store to block .*, which has not started",
        (
            (ROW, "    cluster_arrive();\n", ""),
            (ROW, "reader.start();\n    cluster_wait();\n", "reader.start();\n"),
        ),
    ),
    Fault(
        "a barrier is initialised after the start",
        "a barrier is used before it is initialised",
        (
            (ROW, f"{INIT}    cluster_arrive", "    cluster_arrive"),
            (ROW, "    cluster_wait();\n", f"    cluster_wait();\n{INIT}"),
        ),
    ),
    Fault(
        "a merge slot is used by two stages in turn",
        f"{ORDER}|{OTHER}|nothing can run",  # where blocks disagree on the way that their row takes
        ((REDUCE, "Place* to = places[turn % 2]", "Place* to = places[0]"),),
    ),
    Fault(
        "a barrier's phases are not told apart",
        f"{ORDER}|{OTHER}|{NOT_FINITE}|nothing can run|has exited",
        ((REDUCE, "barrier_wait(barrier, turn / 2 % 2)", "barrier_wait(barrier, 0)"),),
    ),
    Fault(
        "no wait for what other blocks store",
        f"{NOT_FINITE}|has exited|more arrivals at a barrier",
        ((REDUCE, "        barrier_wait(barrier, turn / 2 % 2);\n", ""),),
    ),
    Fault(
        "more bytes are expected than come",
        "nothing can run",
        ((REDUCE, "barrier_expect(barrier, size *", "barrier_expect(barrier, 4 + size *"),),
    ),
    Fault(
        "the warps of a block do not wait for each other",
        f"{ORDER}|{OTHER}|{NOT_FINITE}",
        ((REDUCE, "        block_barrier();\n        if (!in_first_warp())", "        if (!in_first_warp())"),),
    ),
    Fault(
        "a row's numbers are read before they are there",
        f"{ORDER}|{OTHER}|{NOT_FINITE}|nothing can run",
        ((ROW, "        }\n        block_barrier();\n    };\n", "        }\n    };\n"),),
    ),
    Fault(
        "a copy is read before its wait",
        NOT_FINITE,
        (
            (ROW, f"            copy_async_wait();\n{STAGE_1}", STAGE_1),
            (ROW, NORMALISE, f"            copy_async_wait();\n{NORMALISE}"),
        ),
    ),
    Fault(
        "the refill begins before the last read",
        NOT_FINITE,
        (
            (ROW, "                if constexpr (kResident) next.copy(slot, at, refill);\n", ""),
            (
                ROW,
                "                const Vec<T> z = reader.x_at(slot, at), u = kSoft ? reader.y_at(slot, at) : z;\n"
                "                float dz[kColumns];\n",
                "                if constexpr (kResident) next.copy(slot, at, refill);\n"
                "                const Vec<T> z = reader.x_at(slot, at), u = kSoft ? reader.y_at(slot, at) : z;\n"
                "                float dz[kColumns];\n",
            ),
        ),
    ),
    Fault(
        "a share of shared memory is one vector too small",
        "outside of the block's memory|outside of all memory",
        ((READER, "/ kWarp * kWarp * 16 * tensors;", "/ kWarp * kWarp * 16 * tensors - 16;"),),
    ),
    Fault(
        "a share of the row is one vector too small",
        NOT_FINITE,
        ((READER, "static_cast<int64_t>(sizeof(T))) + 2;", "static_cast<int64_t>(sizeof(T))) + 1;"),),
    ),
    Fault(
        "one row is written over the next",
        GAP,
        ((VECTORS, "if (row.holds(first + j)) row.data", "if (first + j >= 0) row.data"),),
    ),
    Fault(
        "the zeros past the vocabulary are one too many",
        GAP,
        ((ROW, "data + p.columns * size, ", "data + (p.columns + 1) * size, "),),
    ),
    Fault(
        "vectors are copied from where they are misaligned",
        "a copy of 16 bytes from",
        ((VECTORS, "is_direct() const { return ", "is_direct() const { return true || "),),
    ),
    Fault(
        "a walk does not wait for its marks",
        f"{ORDER}|{OTHER}",
        ((REST, "        block_barrier();\n        return marks", "        return marks"),),
    ),
    Fault(
        "the listed columns are not the last to be written",
        f"{ORDER}|{OTHER}",
        ((REST, f"        block_barrier();\n{LAST}", LAST),),
    ),
    Fault(
        "a part writes what is listed in another",
        f"{ORDER}|{OTHER}|{NOT_FINITE}",
        ((REST, " && slot >= 0 && slot < reader.count) visit", ") visit"),),
    ),
    Fault(
        "the parts of a row do not wait for each other",
        f"{ORDER}|{OTHER}|{NOT_FINITE}",
        ((REDUCE, "        global_wait(&meeting->arrived, (turn + 1) * count());\n", ""),),
    ),
    Fault(
        "the parts of a row wait for each other once",
        f"{ORDER}|{OTHER}|{NOT_FINITE}",
        ((REDUCE, "(turn + 1) * count());", "count());"),),
    ),
    Fault(
        "a part's place is used by two stages in turn",
        f"{ORDER}|{OTHER}|{NOT_FINITE}",
        ((REDUCE, "meeting->places[turn % 2]", "meeting->places[0]"),),
    ),
    Fault(
        "rows meet in one place",
        f"{ORDER}|{OTHER}|{NOT_FINITE}",
        ((REDUCE, "meeting = split.meetings + row;", "meeting = split.meetings;"),),
    ),
    Fault(
        "the state of a part is dropped",
        OTHER,
        ((REDUCE, PARTS, PARTS.replace("count()", "count() - 1")),),
    ),
    Fault(
        "the state of a part is merged twice",
        OTHER,
        ((REDUCE, PARTS, PARTS.replace("lane", "lane == count() ? 0 : lane")),),
    ),
    Fault(
        "a thread leaves while others wait",
        "nothing can run",
        ((ROW, STAGE_1, f"            if (thread_rank() == 5) return;\n{STAGE_1}"),),
    ),
)


@pytest.fixture(scope="session")
def sound(folder: Path) -> str:
    return results(build(folder, "simt_main.cpp", "simt_sound", "-DSIMT_FEW", "-O0"))


def results(program: Path) -> str:
    """What the program prints: digests, or what went wrong."""
    run = subprocess.run([str(program), "3"], capture_output=True, text=True, timeout=300)
    return run.stdout + run.stderr


def test_the_kernels_as_they_are_have_no_fault(sound: str) -> None:
    assert re.fullmatch(r"(.+ by \d: [0-9a-f]{8}\n)+", sound)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found(fault: Fault, sound: str, folder: Path, tmp_path: Path) -> None:
    csrc = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    for name, old, new in fault.edits:
        text = (csrc / name).read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} times: {old}"
        (csrc / name).write_text(text.replace(old, new))
    program = build(folder, "simt_main.cpp", re.sub(r"\W", "_", fault.name), "-DSIMT_FEW", "-O0", csrc=csrc)
    printed = results(program)
    if printed != sound and re.fullmatch(r"(.+ by \d: [0-9a-f]{8}\n)+", printed):
        printed += OTHER
    assert re.search(fault.says, printed), printed[-2000:]
