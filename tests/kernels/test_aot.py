"""The Triton kernels compile for every target with no GPU, without spills and with 16-byte accesses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd.bench.cost_triton import Counted, per_column

PROGRAM = Path(__file__).parent / "aot.py"
# Of its text: to import it would load Triton as a compiler here, where it interprets.
TARGETS = re.findall(r'^ +"(\w+)": GPUTarget', PROGRAM.read_text(), re.MULTILINE)
NO_ROW = re.compile("^rest-(list|row)-")  # what walks over none
NO_MATRIX = re.compile("-(loss|state|sums?)-")  # what writes none
# Instructions a column of a whole row of 128256 columns of bfloat16, at T = 2.
BUDGETS = {"kd_rows-forward_kl-fused-bf16": 36, "kd_rows-jsd-fused-bf16": 75}


def test_targets() -> None:
    assert {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"} <= set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target: str) -> None:
    result = subprocess.run([sys.executable, str(PROGRAM), target], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = json.loads(result.stdout)
    families = {name.partition("-")[0] for name in kernels}
    assert families == {"kd_rows", "log_softmax", "log_softmax_backward", "scale", "hidden", "rest"}
    faults = []
    for name, resources in kernels.items():
        if resources["spills"]:
            faults.append(f"{name}: {resources['spills']} bytes spilled")
        if NO_ROW.search(name):
            continue
        if not resources["loads_16"]:
            faults.append(f"{name}: no 16-byte load")
        if not NO_MATRIX.search(name) and not resources["stores_16"]:
            faults.append(f"{name}: no 16-byte store")
        if target == "sm_90" and name in BUDGETS:
            column = per_column(Counted(**resources["row"]), 128256, block=8192, threads=512)
            if column > BUDGETS[name]:
                faults.append(f"{name}: {column:.1f} instructions a column")
    assert not faults, "\n".join(faults)
