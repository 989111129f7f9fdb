"""The CUDA module as the compiler made it: no spills, no stack, vector accesses, no waiting. No GPU is needed."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
from collections import Counter

import pytest
import triton

from fastkd.backends import cuda
from fastkd.bench import sass
from fastkd.bench.sass import total

# Where it is required, as .ci/run does where there is nvcc, its absence is a failure.
pytestmark = pytest.mark.skipif(
    cuda.unavailable() is not None and "cuda" not in os.environ.get("FASTKD_REQUIRE", ""),
    reason=cuda.unavailable() or "",
)

REGISTERS = 128, 80  # a thread's, of two and of three blocks of 256 threads on an SM
STATIC_BYTES = 3 << 10  # of shared memory, as csrc/cuda/launch.cu has it
RESERVED_BYTES = 1 << 10  # CUDA's own, which the report counts as a kernel's from sm_90 on


def cuobjdump(*arguments: str) -> str:
    assert cuda.unavailable() is None, cuda.unavailable()
    command = [triton.knobs.nvidia.cuobjdump.path, *arguments, cuda._cuda.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage(*arguments: str) -> list[tuple[str, ...]]:
    """(mangled name, registers, stack, shared, local) of every kernel."""
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return [e for e in re.findall(pattern, cuobjdump(*arguments, "--dump-resource-usage")) if "_kernel" in e[0]]


def test_no_kernel_spills_or_uses_a_stack() -> None:
    kernels = usage()
    assert len(kernels) >= 70  # of one architecture
    for name, registers, stack, shared, local in kernels:
        assert int(registers) <= REGISTERS[0] and stack == local == "0", name
        assert int(shared) <= STATIC_BYTES + RESERVED_BYTES, name


@functools.cache
def sm_90() -> dict[str, str]:
    """The machine code of every kernel, by its mangled name."""
    architectures = set(re.findall(r"\.(sm_\d+)\.cubin", cuobjdump("--list-elf")))
    if "sm_90" not in architectures:
        pytest.skip("FASTKD_CUDA_ARCHS leaves sm_90 out")
    functions = cuobjdump("--gpu-architecture", "sm_90", "--dump-sass").split("Function : ")[1:]
    return {name: code for name, _, code in (f.partition("\n") for f in functions)}


def test_three_blocks_share_an_sm() -> None:
    """In half precision, of which a column has the fewest issue slots."""
    sm_90()  # skips where the module is not built for it
    pattern = r"kd_rows_kernel\w*float16\w*Lb1EEEv"  # bfloat16 too
    resident = [entry for entry in usage("--gpu-architecture", "sm_90") if re.search(pattern, entry[0])]
    assert len(resident) == 18  # 2 dtypes, 9 functors
    for name, registers, *_ in resident:
        assert int(registers) <= REGISTERS[1], name


def kd_rows(pattern: str) -> dict[str, str]:
    return {name: code for name, code in sm_90().items() if re.search(f"kd_rows_kernel.*{pattern}", name)}


def test_rows_move_16_bytes_at_a_time_and_no_cluster_waits_for_memory() -> None:
    rows = kd_rows("")
    assert len(rows) == 54  # 3 dtypes, 9 functors, resident or not
    for name, code in rows.items():
        assert "STG.E.128" in code, name
        assert "LDG.E.128" in code or "LDGSTS.E.BYPASS.128" in code, name
    resident = kd_rows("Lb1EEEv")
    assert len(resident) == 27
    for name, code in resident.items():
        assert "LDGSTS.E.BYPASS.128" in code and "STAS" in code and "SYNCS" in code, name
        # The loop over rows is the longest. A barrier of the cluster, which orders all of memory, comes before it.
        parsed = sass.Code(code)
        first, last = max(parsed.spans(), key=lambda span: span[1] - span[0])
        loop = Counter(instruction.name for instruction in parsed.instructions[first : last + 1])
        assert total(loop, "STG.E.128") and total(loop, "BAR.SYNC"), name
        assert not total(loop, "MEMBAR", "CCTL", "UCGABAR", "ERRBAR"), name


def test_the_rest_of_a_row_moves_16_bytes_at_a_time() -> None:
    rest = {name: code for name, code in sm_90().items() if re.search("rest_(rows|grad)_kernel", name)}
    assert len(rest) == 6  # 3 dtypes
    for name, code in rest.items():
        assert "LDG.E.128" in code, name
        assert "STG.E.128" in code or "rest_rows" in name, name


def test_the_sums_of_a_slice_read_16_bytes_at_a_time() -> None:
    sums = {name: code for name, code in sm_90().items() if "slice_sums_kernel" in name}
    assert len(sums) == 24  # 3 dtypes, 8 functors
    for name, code in sums.items():
        assert "LDG.E.128" in code, name


# (compute capability, shared memory of a block, of an SM, reserved of a block), in KB but for the first.
DEVICES = {"sm_80": (8, 163, 164, 1), "sm_89": (8, 99, 100, 1), "sm_90": (9, 227, 228, 1), "sm_120": (12, 99, 100, 1)}


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("tensors", [1, 2])
def test_a_grid_holds_its_row(gpu: str, tensors: int) -> None:
    """Every plan holds a row; the first shares an SM where one can, and the last streams, which is always possible."""
    assert cuda.unavailable() is None, cuda.unavailable()
    major, *sizes = DEVICES[gpu]
    block, sm, reserved = (size << 10 for size in sizes)
    shared_by = {}
    for vectors in (1, 40, 257, 1500, 4002, 6285, 16034, 18994, 32002, 65538, 10**6):
        *resident, last = cuda._cuda.plans(major, block, sm, reserved, vectors, tensors)
        assert last == (False, 1, 256, 0)
        for keeps, cluster, threads, shared in resident:
            assert keeps and threads in (32, 64, 128, 256)
            assert cluster in ((1, 2, 4, 8, 16) if major >= 9 else (1,))
            assert shared >= 16 * tensors * -(-vectors // cluster)
            assert shared + STATIC_BYTES <= block and shared + STATIC_BYTES + reserved <= sm
        shared_by[vectors] = [(cluster, sm // (shared + STATIC_BYTES + reserved)) for _, cluster, _, shared in resident]
    if gpu == "sm_90" and tensors == 2:
        # Clusters and blocks of an SM: bfloat16 rows of 32000, 128256, 151936 and 256000 columns.
        first = [shared_by[vectors][0] for vectors in (4002, 16034, 18994, 32002)]
        assert first == [(2, 3), (8, 3), (8, 2), (16, 3)]
        # Where a device has no clusters of 16, or an SM no room for two blocks, there is something left to try.
        assert {cluster for cluster, _ in shared_by[32002]} >= {16, 8}
        assert shared_by[65538], "one pass is promised for 262144 columns, in any dtype, of two tensors"


@pytest.mark.parametrize("sms", [46, 108, 132, 170])
def test_parts_of_rows(sms: int) -> None:
    """All of them run at once, each worth its while; a warp merges them."""
    assert cuda.unavailable() is None, cuda.unavailable()
    for rows, vectors in itertools.product((1, 2, 3, sms // 2, sms // 2 + 1, 4096), (1, 1023, 1024, 16034, 10**6)):
        parts = cuda._cuda.parts(rows, vectors, sms)
        assert 1 <= parts <= 32
        assert parts == 1 or (rows * parts <= sms and vectors >= 512 * parts)
        assert (parts > 1) == (2 * rows <= sms and vectors >= 1024)


def test_an_error_names_the_kernel_and_the_shape() -> None:
    """Without a GPU nothing launches; with one, a grid of 0 rows does not."""
    assert cuda.unavailable() is None, cuda.unavailable()
    absent, on = (0, 0, 0, 0), (0, 0, None)
    scale = cuda._cuda.scale(absent, 0, 1, 7, 0, on)
    log_softmax = cuda._cuda.log_softmax(absent, absent, absent, 0, 0, 1, 7, 1.0, on)
    assert re.match(r"scale on 0 x 7 \(.*256 threads.*\): \w+", scale)
    assert re.match(r"log_softmax on 0 x 7 \(.*\): \w+", log_softmax)
