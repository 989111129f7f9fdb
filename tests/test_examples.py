"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastkd

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder: Path, name: str, *arguments: str) -> str:
    """What it prints, run as a user runs it; the package alone is on the path."""
    (folder / "fastkd").symlink_to(Path(fastkd.__file__).parent)
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_they_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 120


def test_fsdp2(tmp_path: Path) -> None:
    """It compares its first step with one process's by itself."""
    output = run(tmp_path, "fsdp2", "--steps", "2")
    assert re.search(r"differ from one process's by \d", output)
    assert re.search(r"step 1: loss \d+\.\d+ of \d+ tokens", output)


def test_hidden_layers(tmp_path: Path) -> None:
    output = run(tmp_path, "hidden_layers", "--steps", "2")
    assert "23 tensors copied" in output
    assert len(re.findall(r"held-out loss \d+\.\d+$", output, re.MULTILINE)) == 4


def test_offline_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A teacher and a student that are stopped midway and go on come to what undisturbed ones come to."""
    module = example("offline_cache")
    at_once = module.main(["--out", str(tmp_path / "at once"), "--steps", "12"])
    assert "with row 0 of 64" in capsys.readouterr().out
    folder = tmp_path / "resumed"
    module.write_cache(folder / "cache", module.make_rows()[:21])
    module.main(["--out", str(folder), "--steps", "3"])
    assert "with row 21 of 64" in capsys.readouterr().out
    resumed = module.main(["--out", str(folder), "--steps", "12"])
    output = capsys.readouterr().out
    assert "with row 64 of 64" in output
    assert "with step 3 of 12" in output
    for name, parameter in at_once.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], parameter), name


@pytest.mark.parametrize("ranks", [2, 3])
def test_tensor_parallel(ranks: int) -> None:
    """On several ranks it prints the losses of one process, whose teacher it follows."""

    def losses(*command: str) -> list[float]:
        path = str(EXAMPLES / "tensor_parallel.py")
        options = {"OMP_NUM_THREADS": "1", "FASTKD_BACKEND": "torch", "PYTHONPATH": str(EXAMPLES.parent)}
        done = subprocess.run(
            [sys.executable, *command, path, "--steps", "4"], env=os.environ | options, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return [float(number) for number in re.findall(r"^step \d: loss (\S+)$", done.stdout, re.MULTILINE)]

    alone = losses()
    assert len(alone) == 4
    together = losses("-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone")
    assert together == pytest.approx(alone, rel=1e-5)


def test_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    found = example("plain_loop").main(["--steps", "2"])
    printed = capsys.readouterr().out
    assert len(found) == 3
    assert all(f"{who}: {bits:.3f} bits a byte" in printed for who, bits in found.items())
