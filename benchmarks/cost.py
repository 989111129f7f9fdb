"""What a kernel should cost on a GPU, by a model: predicted, not measured.

A row is loops, each with what a warp issues in a turn and the columns that a turn takes for each thread; and what a
warp issues outside of them, the first warp of a block more. Counted so (sass.py), a call is bound by the slowest of

- bytes, at the speed of a copy;
- issue: four warps' instructions a cycle and SM, none of which is lost;
- exponentials, and what else the special-function unit does: one warp's instruction takes an SM two cycles;
- waits: a block works on one row at a time, and an SM holds so many blocks. Alone a block's row would take the
  instructions before the gradient, the gradient or the copy of the next row, whichever is longer, which overlap, and
  what it waits for: the end of that copy, and each exchange within its cluster. N blocks do N rows in that time.

Clusters lie within the groups of SMs that share a part of the chip, and the last ones of a call may leave SMs idle.

``python -m fastkd.bench.cost`` counts the compiled CUDA kernels of sm_90 and records that in ``results/``.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from fastkd.bench import sass
from fastkd.bench.cases import VOCABULARIES
from fastkd.bench.sass import Counts, Want, total

RECORD = Path(__file__).resolve().parent / "results" / "cost-sm_90.json"
ROWS = 4096

# Assumed of every Hopper GPU.
ISSUES, SPECIALS = 4, 0.5  # instructions of warps that an SM begins in a cycle
ALONE = 0.5  # of those, what a block of 256 threads reaches with an SM to itself
SM_BYTES = 64  # that an SM takes in a cycle, with the chip to itself
COPY_WAIT, EXCHANGE_WAIT = 1e-6, 1e-6  # seconds
REGISTERS, THREADS, SHARED, RESERVED = 65536, 2048, 228 << 10, 1 << 10  # of an SM; of shared memory, CUDA's of a block
GROUPS = (16, 16, 16, 16, 16, 16, 18, 18)  # SMs


class Machine(NamedTuple):
    name: str
    bandwidth: float  # bytes a second, read and written, that a copy reaches
    clock: float = 1.755e9


MACHINES = (Machine("H100", 3.0e12), Machine("H200", 4.3e12))


class Issued(NamedTuple):
    """By one warp."""

    issues: float
    specials: float

    def __add__(self, other: Issued) -> Issued:  # type: ignore[override]
        return Issued(self.issues + other.issues, self.specials + other.specials)

    def times(self, n: float) -> Issued:
        return Issued(self.issues * n, self.specials * n)


class Loop(NamedTuple):
    name: str
    columns: int  # of a turn and thread
    turn: Issued


class Kernel(NamedTuple):
    loops: tuple[Loop, ...]  # the last one writes the gradient
    warp: Issued  # outside of them
    first_warp: Issued
    exchanges: int  # within the cluster
    registers: int  # of a thread


class Grid(NamedTuple):
    """Of a row."""

    cluster: int  # blocks
    threads: int  # of a block
    shared: int  # bytes of a block, static ones too

    def blocks(self, registers: int) -> int:
        """Of an SM."""
        return min(REGISTERS // (registers * self.threads), THREADS // self.threads, SHARED // (self.shared + RESERVED))


class Prediction(NamedTuple):
    """Seconds of a call, each bound by itself."""

    bytes: float
    issue: float
    specials: float
    waits: float
    idle: float  # the last clusters' share that is lost: a factor

    @property
    def seconds(self) -> float:
        return max(self.bytes, self.issue, self.specials, self.waits) * self.idle

    @property
    def of_copy(self) -> float:
        return self.bytes / self.seconds


def block_issues(kernel: Kernel, grid: Grid, vocab: int) -> tuple[Issued, Issued]:
    """What the warps of a block issue for its share of a row: before the gradient, and for that."""
    share = -(-vocab // grid.cluster)
    loops = [loop.turn.times(-(-share // (32 * loop.columns))) for loop in kernel.loops]
    outside = kernel.warp.times(grid.threads // 32 - 1) + kernel.first_warp
    return sum(loops[:-1], outside), loops[-1]


def per_column(kernel: Kernel, grid: Grid, vocab: int) -> float:
    """Instructions of a thread for each column of a row, everything counted."""
    return sum(block_issues(kernel, grid, vocab), Issued(0, 0)).issues * grid.cluster * 32 / vocab


def predict(
    machine: Machine, kernel: Kernel, grid: Grid, vocab: int, column_bytes: float, rows: int = ROWS
) -> Prediction:
    """``column_bytes``: what a column of the row moves, to and from memory."""
    before, gradient = block_issues(kernel, grid, vocab)
    row = (before + gradient).times(grid.cluster)
    sms = sum(GROUPS)
    blocks = grid.blocks(kernel.registers)
    clusters = sum(group * blocks // grid.cluster for group in GROUPS)
    alone = ALONE * ISSUES * machine.clock
    copied = column_bytes * vocab / grid.cluster / (SM_BYTES * machine.clock)
    waits = COPY_WAIT + EXCHANGE_WAIT * kernel.exchanges * (grid.cluster > 1)
    one_block = before.issues / alone + max(gradient.issues / alone, copied) + waits
    return Prediction(
        bytes=rows * vocab * column_bytes / machine.bandwidth,
        issue=rows * row.issues / (ISSUES * machine.clock * sms),
        specials=rows * row.specials / (SPECIALS * machine.clock * sms),
        waits=rows * one_block / clusters,
        idle=-(-rows // clusters) * clusters / rows,
    )


# ---- The CUDA kernels: how they are found, and what a row passes.

# Divergence: its functor, mangled; the walks that sum exponentials, each of which ends in an exchange.
FUNCTORS = {
    "forward_kl": (r"MixtureKLILb1ELb0ELNS._3MixE0E", 1),
    "reverse_kl": (r"MixtureKLILb0ELb1ELNS._3MixE1E", 1),
    "cross_entropy": ("CrossEntropy", 1),
    "jsd": (r"MixtureKLILb1ELb1ELNS._3MixE2E", 2),
    "tvd": ("TotalVariation", 2),
    "symmetric_kl": ("SymmetricKL", 1),
}
DTYPES = {"bfloat16": (r"kd_rows_kernelINS\w*8bfloat16E", 2), "float32": ("kd_rows_kernelIf", 4)}
RESIDENT = r".*Lb1ELb1EEEv"
# Rows that are not copied as they are: what a turn of the loop that fills shared memory then loads and stores, both
# tensors'. Off 16 bytes: by another amount than the gradient's row.
FILLS = {
    "student off 16 bytes": {"LDG.E.128": 3},
    "both off 16 bytes": {"LDG.E.128": 4},
    "bfloat16 beside float32": {"LDG.E.128": 1, "LDG.E.64": 1},
    "bfloat16 beside float32, both off 16 bytes": {"LDG.E.128": 2, "LDG.E.64": 2},
}
LIMITS = (9, 227 << 10, 228 << 10, RESERVED)  # of sm_90, as plans() takes them
TENSORS = 2


def counted(code: sass.Code, walks: int, item: int) -> dict[str, Any]:
    """What :data:`RECORD` holds of a kernel's machine code."""
    vector = sass.VECTOR // item

    def columns(turn: Counts) -> int:
        return total(turn, "LDS.128") // TENSORS * vector

    def turns(turn: Counts) -> float:
        return 64 * vector / columns(turn)  # of a long row, so that its ways are weighed as they are there

    def is_walk(turn: Counts, *, exponentials: bool, stores: bool) -> bool:
        found = total(turn, "MUFU.EX2") >= columns(turn) if exponentials else not total(turn, "MUFU", "LDGSTS")
        return columns(turn) > 0 and found and (total(turn, "STG") > 0) == stores

    def is_fill(turn: Counts) -> bool:
        return total(turn, "STS.128") == total(turn, "LDGSTS") == TENSORS and not total(turn, "MUFU")

    wants = (
        Want("maxima", lambda turn: is_walk(turn, exponentials=False, stores=False), turns),
        Want("sums", lambda turn: is_walk(turn, exponentials=True, stores=False), turns, walks),
        Want("gradient", lambda turn: is_walk(turn, exponentials=True, stores=True), turns),
    )

    labelled = {"LDG.E.64": 1}  # the hard term too: its label is fetched
    row = sass.row(code, wants, labelled)
    # The first warp exchanges, and takes the normalisers' and the label's quotients and exponentials.
    more = {name: total(row.outside, name) + 3 for name in ("MUFU.RCP", "MUFU.EX2")}
    first = sass.row(code, wants, {**labelled, "SYNCS.PHASECHK": walks, "STAS": walks, **more})

    def issued(counts: Counts) -> dict[str, int]:
        return {"issues": total(counts), "specials": total(counts, "MUFU")}

    def within(span: tuple[int, int]) -> Counts:
        return Counter(instruction.name for instruction in code.instructions[span[0] : span[1] + 1])

    fill = max(span for span in code.spans() if is_fill(within(span)))
    fills = {}
    for name, loads in FILLS.items():
        if item == 4 or "LDG.E.64" not in loads:
            way = sass.cheapest(code, *fill, {}, (), {**loads, "STS.128": TENSORS})
            fills[name] = total(way.outside) / vector

    return {
        "fills": fills,
        "exchanges": walks,
        "loops": [{"name": name, "columns": columns(turn), **issued(turn)} for name, turn in row.loops],
        "warp": issued(row.outside),
        "first_warp": issued(first.outside),
    }


def record(cuda: Any, cuobjdump: str) -> dict[str, Any]:
    """Counts of the compiled module's kernels, and the grids of their rows."""

    def run(*arguments: str) -> str:
        return subprocess.run([cuobjdump, *arguments, cuda.__file__], capture_output=True, text=True, check=True).stdout

    dump = run("--gpu-architecture", "sm_90", "--dump-sass").split("Function : ")[1:]
    codes = {name: code for name, _, code in (text.partition("\n") for text in dump)}
    usage = dict(re.findall(r"Function (\w+):\s+(REG:.*)", run("--gpu-architecture", "sm_90", "--dump-resource-usage")))
    found: dict[str, Any] = {"kernels": {}, "grids": {}}
    for (divergence, (functor, walks)), (dtype, (mangled, item)) in product(FUNCTORS.items(), DTYPES.items()):
        (name,) = (name for name in codes if re.search(mangled + ".*" + functor + RESIDENT, name))
        registers, static = (int(x) for x in re.findall(r"(?:REG|SHARED):(\d+)", usage[name]))
        found["kernels"][f"{divergence} {dtype}"] = {
            "registers": registers, "static": static - RESERVED, **counted(sass.Code(codes[name]), walks, item)
        }  # fmt: skip
    for vocab, (dtype, (_, item)) in product(VOCABULARIES, DTYPES.items()):
        resident, cluster, threads, shared = cuda.plans(*LIMITS, vocab * item // sass.VECTOR + 2, TENSORS)[0]
        if resident:
            found["grids"][f"{vocab} {dtype}"] = {"cluster": cluster, "threads": threads, "shared": shared}
    return found


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def cases(found: dict[str, Any]) -> Iterator[tuple[str, str, int, Kernel, Grid]]:
    """(divergence, dtype, vocabulary, kernel, grid)."""
    for (name, kernel), vocab in product(found["kernels"].items(), VOCABULARIES):
        divergence, dtype = name.split()
        if grid := found["grids"].get(f"{vocab} {dtype}"):
            shared = grid["shared"] + kernel["static"]
            yield divergence, dtype, vocab, kernel_of(kernel), Grid(grid["cluster"], grid["threads"], shared)


def kernel_of(entry: dict[str, Any]) -> Kernel:
    loops = tuple(Loop(x["name"], x["columns"], Issued(x["issues"], x["specials"])) for x in entry["loops"])
    return Kernel(loops, Issued(**entry["warp"]), Issued(**entry["first_warp"]), entry["exchanges"], entry["registers"])


def table(found: dict[str, Any]) -> list[list[str]]:
    """A header and a line for each case: loss and gradient, the cross-entropy with it, at T = 2."""
    header = ["divergence", "dtype", "vocabulary", "cluster", "blocks an SM", "instructions a column", "issue",
              "exponentials", "waits"]  # fmt: skip
    lines = [header + [f"{what}, {machine.name}" for machine in MACHINES for what in ("bytes", "of a copy")]]
    for divergence, dtype, vocab, kernel, grid in cases(found):
        every = [predict(m, kernel, grid, vocab, 3 * DTYPES[dtype][1]) for m in MACHINES]
        lines.append([
            divergence, dtype, str(vocab), str(grid.cluster), str(grid.blocks(kernel.registers)),
            f"{per_column(kernel, grid, vocab):.1f}", *(f"{x * 1e3:.2f}" for x in every[0][1:4]),
            *(text for p in every for text in (f"{p.bytes * 1e3:.2f}", f"{p.of_copy:.0%}")),
        ])  # fmt: skip
    return lines


def fills_table(found: dict[str, Any], vocab: int = 128256) -> list[list[str]]:
    """A header and a line for each kernel: instructions a column, and those of other rows times as many."""
    lines = [["divergence", "kernel's dtype", "instructions a column", *(f"x, {name}" for name in FILLS)]]
    for divergence, dtype, size, kernel, grid in cases(found):
        if size == vocab:
            aligned = per_column(kernel, grid, size)
            fills = found["kernels"][f"{divergence} {dtype}"]["fills"]
            more = [f"{1 + fills[name] / aligned:.2f}" if name in fills else "" for name in FILLS]
            lines.append([divergence, dtype, f"{aligned:.1f}", *more])
    return lines


if __name__ == "__main__":
    import triton

    from fastkd import _cuda

    RECORD.write_text(json.dumps(record(_cuda, triton.knobs.nvidia.cuobjdump.path), indent=1) + "\n")
