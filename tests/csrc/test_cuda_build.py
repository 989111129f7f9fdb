"""The CUDA module as the compiler made it: no spills, no stack, vector accesses, cluster barriers. No GPU is needed."""

from __future__ import annotations

import functools
import os
import re
import subprocess

import pytest
import triton

from fastkd.backends import cuda
from tests.csrc.sass import count, innermost_loops, shortest_turn

# Where it is required, as .ci/run does where there is nvcc, its absence is a failure.
pytestmark = pytest.mark.skipif(
    cuda.unavailable() is not None and "cuda" not in os.environ.get("FASTKD_REQUIRE", ""),
    reason=cuda.unavailable() or "",
)

MAX_REGISTERS = 128  # of two blocks of 256 threads on an SM
STATIC_BYTES = 6 << 10  # of shared memory, as csrc/cuda/launch.cu has it
RESERVED_BYTES = 1 << 10  # CUDA's own, which the report counts as a kernel's from sm_90 on


def cuobjdump(*arguments: str) -> str:
    assert cuda.unavailable() is None, cuda.unavailable()
    command = [triton.knobs.nvidia.cuobjdump.path, *arguments, cuda._cuda.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_no_kernel_spills_or_uses_a_stack() -> None:
    usage = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", cuobjdump("--dump-resource-usage")
    )
    kernels = [entry for entry in usage if "_kernel" in entry[0]]
    assert len(kernels) >= 70  # of one architecture
    for name, registers, stack, shared, local in kernels:
        assert int(registers) <= MAX_REGISTERS and stack == local == "0", name
        assert int(shared) <= STATIC_BYTES + RESERVED_BYTES, name


@functools.cache
def sm_90() -> dict[str, str]:
    """The machine code of every kernel, by its mangled name."""
    architectures = set(re.findall(r"\.(sm_\d+)\.cubin", cuobjdump("--list-elf")))
    if "sm_90" not in architectures:
        pytest.skip("FASTKD_CUDA_ARCHS leaves sm_90 out")
    functions = cuobjdump("--gpu-architecture", "sm_90", "--dump-sass").split("Function : ")[1:]
    return {name: code for name, _, code in (f.partition("\n") for f in functions)}


def test_rows_move_16_bytes_at_a_time_and_clusters_have_barriers() -> None:
    rows = {name: code for name, code in sm_90().items() if "kd_rows_kernel" in name}
    assert len(rows) == 48  # 3 dtypes, 8 functors, resident or not
    for name, code in rows.items():
        assert "STG.E.128" in code, name
        assert "LDG.E.128" in code or "LDGSTS.E.BYPASS.128" in code, name
        assert "UCGABAR_ARV" in code and "UCGABAR_WAIT" in code, name
    assert any("LDGSTS.E.BYPASS.128" in code for code in rows.values())


# What 132 SMs issue at 1.7 GHz, 128 a cycle, for each column of bfloat16 that 3 TB/s bring and take, at 6 bytes.
BUDGET = 132 * 128 * 1.7e9 / (3e12 / 6)


@pytest.mark.parametrize(
    "functor", ["MixtureKLILb1ELb0ELNS1_3MixE0E", "MixtureKLILb0ELb1ELNS1_3MixE1E", "CrossEntropy"]
)
def test_a_column_costs_less_than_its_bytes(functor: str) -> None:
    """Of the one-pass kernels of forward KL, reverse KL and cross-entropy at T = 2: they issue what memory lets them.

    A true mixture and total variation have a walk more, and do not.
    """
    columns = 8
    resident = [code for name, code in sm_90().items() if re.search(f"8bfloat16.*{functor}.*Lb1ELb1EEEv", name)]
    assert len(resident) == 1
    loops = innermost_loops(resident[0])
    cost = {"loads": sum(shortest_turn(loop, "LDGSTS", 1) for loop in loops if count(loop, "LDGSTS"))}
    walks = [loop for loop in loops if count(loop, "MUFU.EX2") >= columns]
    for stage, only in (("stage 1", "FMNMX"), ("stage 3", "STG")):
        # At T = 2 there are fewer exponentials than at any T, for which the kernel has loops of its own.
        loop = min((loop for loop in walks if count(loop, only)), key=lambda loop: count(loop, "MUFU.EX2"))
        cost[stage] = shortest_turn(loop, "MUFU.EX2", columns)
    assert sum(cost.values()) / columns < BUDGET, cost


# (compute capability, shared memory of a block, of an SM, reserved of a block), in KB but for the first.
DEVICES = {"sm_80": (8, 163, 164, 1), "sm_89": (8, 99, 100, 1), "sm_90": (9, 227, 228, 1), "sm_120": (12, 99, 100, 1)}


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("tensors", [1, 2])
def test_a_grid_holds_its_row(gpu: str, tensors: int) -> None:
    assert cuda.unavailable() is None, cuda.unavailable()
    major, *sizes = DEVICES[gpu]
    block, sm, reserved = (size << 10 for size in sizes)
    largest = 0
    for vectors in (1, 40, 257, 1500, 4002, 6285, 16034, 18994, 32002, 65538, 10**6):
        resident, cluster, threads, shared = cuda._cuda.plan(major, block, sm, reserved, vectors, tensors)
        assert threads % 32 == 0 and 32 <= threads <= 256
        assert cluster in ((1, 2, 4, 8, 16) if major >= 9 else (1,))
        if not resident:
            assert (cluster, threads, shared) == (1, 256, 0) and vectors > largest
            continue
        largest = vectors
        assert shared >= 16 * tensors * -(-vectors // cluster)
        assert shared + STATIC_BYTES <= block
        assert cluster == 16 or 2 * (shared + STATIC_BYTES + reserved) <= sm
    # What one pass is promised for: 262144 columns, in any dtype, of two tensors.
    assert gpu != "sm_90" or largest >= 65538


def test_an_error_names_the_kernel_and_the_shape() -> None:
    """Without a GPU nothing launches; with one, a grid of 0 rows does not."""
    assert cuda.unavailable() is None, cuda.unavailable()
    absent = (0, 0, 0, 0)
    scale = cuda._cuda.scale(absent, 0, 1, 7, 0, 0, 0)
    log_softmax = cuda._cuda.log_softmax(absent, absent, absent, 0, 0, 1, 7, 1.0, 0, 0)
    assert re.match(r"scale on 0 x 7 \(.*256 threads.*\): \w+", scale)
    assert re.match(r"log_softmax on 0 x 7 \(.*\): \w+", log_softmax)
