"""What the Triton row kernel should cost on a GPU, by a model: predicted, not measured.

A call is bound by the slowest of

- bytes: the first read of the logits and the gradient, and of each later read what L2 has not kept: the rows in flight
  share what the launch table counts on of it (``kernels/config.py``);
- issue: four warps' instructions a cycle of each SM that the programs in flight occupy;
- exponentials and logarithms, half a warp's instruction a cycle of these SMs.

Waits for memory are not in it, nor are rows near convergence and launches. ``python -m fastkd.bench.cost_triton``
counts the kernels of sm_90 and records that in ``results/``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from fastkd.bench.cost import ISSUES, MACHINES, ROWS, SPECIALS, Machine

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "cost-triton-sm_90.json"
VOCABULARIES = (32000, 128256, 256000)
ITEM = 2  # bytes of bfloat16
LANES = 32


class Counted(NamedTuple):
    """What a warp issues for a row, in the far form: a turn of each walk over an unmasked and a masked tile."""

    walks: list[list[int]]  # a walk that does not look for the label has its one masked tile outside
    specials: list[list[int]]
    outside: int


def per_column(counted: Counted, columns: int, block: int, threads: int, specials: bool = False) -> float:
    """Instructions of a thread for each column of a row; of the special-function unit, those in the loops."""
    tiles, issued = columns // block, 0 if specials else counted.outside
    for unmasked, *masked in counted.specials if specials else counted.walks:
        issued += (tiles - len(masked)) * unmasked + 2 * sum(masked)  # the label's tile and the last
    return issued * threads / columns


class Prediction(NamedTuple):
    programs: int
    kept: float  # of a later read, the share that L2 serves
    column: float  # instructions
    bytes: float  # seconds, each bound by itself
    issue: float
    specials: float
    of_copy: float  # of the speed of a copy that moves each element once


def predict(machine: Machine, counted: Counted, columns: int) -> Prediction:
    from fastkd.kernels import config

    gpu, vec, walks = config.GPUS[machine.name], config.VECTOR_BYTES // ITEM, len(counted.walks)
    options = config.launch_options(gpu, columns, vec)
    threads, row_bytes = options["num_warps"] * LANES, 2 * ITEM * columns
    least = config.LEAST_SHARE if walks == 2 else config.LEAST_SHARE_OF_THREE
    programs = config.programs_of(gpu, ROWS, row_bytes, options["num_warps"], least)
    kept = min(1.0, config.CACHE_SHARE * gpu.cache / (programs * row_bytes))
    moved = ROWS * columns * ITEM * (2 * (1 + (walks - 1) * (1 - kept)) + 1)
    busy = min(gpu.processors, programs * threads // config.THREADS)
    warps_a_second = machine.clock * busy * LANES
    column = per_column(counted, columns, options["BLOCK"], threads)
    special = per_column(counted, columns, options["BLOCK"], threads, specials=True)
    bounds = (
        moved / machine.bandwidth,
        ROWS * columns * column / (ISSUES * warps_a_second),
        ROWS * columns * special / (SPECIALS * warps_a_second),
    )
    copy = 3 * ITEM * ROWS * columns / machine.bandwidth
    return Prediction(programs, kept, column, *bounds, copy / max(bounds))


def record() -> dict[str, Any]:
    """By divergence, from the kernels as they are compiled ahead of time."""
    program = ROOT / "tests" / "kernels" / "aot.py"
    command = [sys.executable, str(program), "sm_90", "-fused-bf16"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = json.loads(output.splitlines()[-1])
    return {name.split("-")[1]: kernel["row"] for name, kernel in kernels.items() if "row" in kernel}


def recorded() -> dict[str, Counted]:
    return {name: Counted(**row) for name, row in json.loads(RECORD.read_text()).items()}


def table(found: dict[str, Counted]) -> list[list[str]]:
    header = ["divergence", "vocabulary", "instructions a column"]
    columns = ("programs", "kept in L2", "bytes", "issue", "exponentials", "of a copy")
    lines = [header + [f"{what}, {machine.name}" for machine in MACHINES for what in columns]]
    for name, counted in found.items():
        for vocab in VOCABULARIES:
            every = [predict(machine, counted, vocab) for machine in MACHINES]
            lines.append([name, str(vocab), f"{every[0].column:.1f}"] + [
                text
                for p in every
                for text in (str(p.programs), f"{p.kept:.0%}", f"{p.bytes * 1e3:.2f}", f"{p.issue * 1e3:.2f}",
                             f"{p.specials * 1e3:.2f}", f"{p.of_copy:.0%}")
            ])  # fmt: skip
    return lines


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record(), indent=1) + "\n")
