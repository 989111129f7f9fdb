"""The CUDA module as the compiler made it: no spills, no stack, vector accesses, cluster barriers. No GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import triton

from fastkd.backends import cuda

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="needs nvcc, without which there is no CUDA module"
)

MAX_REGISTERS = 80  # of three blocks of 256 threads on an SM


def cuobjdump(*arguments: str) -> str:
    assert cuda.unavailable() is None, cuda.unavailable()
    command = [triton.knobs.nvidia.cuobjdump.path, *arguments, cuda._cuda.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_no_kernel_spills_or_uses_a_stack() -> None:
    usage = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump("--dump-resource-usage")
    )
    kernels = [entry for entry in usage if "_kernel" in entry[0]]
    assert len(kernels) >= 70  # of one architecture
    bad = [e for e in kernels if int(e[1]) > MAX_REGISTERS or int(e[2]) or int(e[3])]
    assert not bad


def test_rows_move_16_bytes_at_a_time_and_clusters_have_barriers() -> None:
    architectures = set(re.findall(r"\.(sm_\d+)\.cubin", cuobjdump("--list-elf")))
    if "sm_90" not in architectures:
        pytest.skip("FASTKD_CUDA_ARCHS leaves sm_90 out")
    functions = cuobjdump("--gpu-architecture", "sm_90", "--dump-sass").split("Function : ")[1:]
    rows = {name: code for name, _, code in (f.partition("\n") for f in functions) if "kd_rows_kernel" in name}
    assert len(rows) == 48  # 3 dtypes, 8 functors, resident or not
    for name, code in rows.items():
        assert "STG.E.128" in code, name
        assert "LDG.E.128" in code or "LDGSTS.E.BYPASS.128" in code, name
        assert "UCGABAR_ARV" in code and "UCGABAR_WAIT" in code, name
    assert any("LDGSTS.E.BYPASS.128" in code for code in rows.values())


def test_an_error_names_the_kernel_and_the_shape() -> None:
    """Without a GPU nothing launches; with one, a grid of 0 rows does not."""
    assert cuda.unavailable() is None, cuda.unavailable()
    absent = (0, 0, 0, 0)
    scale = cuda._cuda.scale(absent, 0, 1, 7, 0, 0)
    log_softmax = cuda._cuda.log_softmax(absent, absent, absent, 0, 0, 1, 7, 1.0, 0)
    assert re.match(r"scale on 0 x 7 \(.*256 threads.*\): \w+", scale)
    assert re.match(r"log_softmax on 0 x 7 \(.*\): \w+", log_softmax)
