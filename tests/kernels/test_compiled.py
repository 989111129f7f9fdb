"""What compiles the Triton kernels again, and what must not. No GPU is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent / "compiled.py"


def test_what_varies_from_call_to_call_compiles_nothing() -> None:
    result = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    compiled = json.loads(result.stdout)
    # The gradient with its losses, and from statistics; scaling; log-softmax, forward and backward; hidden states; of
    # the rest of a row the list, the state, the row and the gradient.
    assert compiled.pop("first") == 10
    # Of slices the state, the sums and the gradient, the gradient from statistics, and two each of log-softmax;
    # scaling, hidden states, and of the rest all but the row, have longer tiles.
    assert compiled.pop("few long rows") == 13
    assert compiled.pop("another structure") == 2
    assert set(compiled.values()) == {0}, compiled
