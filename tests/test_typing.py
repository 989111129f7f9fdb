"""What a user's type checker sees: the result's type by return_parts, and a mistake where there is one."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastkd
from fastkd import functional

PROGRAM = """
from typing_extensions import assert_type

from torch import Tensor

import fastkd


def good(student: Tensor, teacher: Tensor, labels: Tensor, parts: bool) -> Tensor:
    fastkd.kd_loss(student, teacher).backward()
    fastkd.kd_loss(
        student, teacher, labels, temperature=2, hard_weight=0.5, divergence=fastkd.JSD(0.3), mask=labels > 3,
        soft_mask=labels > 2, num_items=(3, labels.count_nonzero()), reduction="mean", backend="torch",
    ).backward()
    assert_type(fastkd.kd_loss(student, teacher, return_parts=False), Tensor)
    assert_type(fastkd.kd_loss(student, teacher, return_parts=True), fastkd.KDLossParts)
    assert_type(fastkd.kd_loss(student, teacher, return_parts=parts), Tensor | fastkd.KDLossParts)
    assert_type(fastkd.log_softmax(student), Tensor)
    loss_fn: fastkd.KDLoss = fastkd.KDLoss(temperature=2.0, divergence="tvd")
    loss_fn.temperature, loss_fn.divergence = 3, fastkd.SkewKL(0.1)
    loss_fn(student, teacher, labels, mask=labels > 3, num_items=7).backward()
    assert_type(loss_fn(student, teacher), Tensor)
    assert_type(fastkd.KDLoss(return_parts=True)(student, teacher).soft, Tensor)
    assert_type(fastkd.KDLoss(return_parts=parts)(student, teacher), Tensor | fastkd.KDLossParts)
    return loss_fn(student, teacher)


def bad(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    fastkd.kd_loss(student, teacher, return_parts=True).backward()  # error
    fastkd.kd_loss(student, teacher, temperature="2")  # error
    fastkd.kd_loss(student, teacher, labels, alpha=0.5)  # error
    fastkd.kd_loss(student, teacher, labels, 0.5)  # error
    fastkd.KDLoss(alpha=0.5)  # error
    fastkd.KDLoss(mask=labels)  # error
    fastkd.KDLoss()(student, teacher, num_items_in_batch=1)  # error
    fastkd.KDLoss().temperature = "2"  # error
"""


def test_a_users_program(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """mypy --strict passes what is right, and finds what is wrong. (Tensor.backward has no types in PyTorch itself.)"""
    package = Path(fastkd.__file__).parent
    assert (package / "py.typed").exists()
    (tmp_path / "user.py").write_text(PROGRAM)
    assert pytestconfig.cache is not None
    command = [sys.executable, "-m", "mypy", "--strict", "--allow-untyped-calls", "--follow-imports=silent", "user.py"]
    result = subprocess.run(
        [*command, f"--cache-dir={pytestconfig.cache.mkdir('mypy')}"],
        cwd=tmp_path, env=os.environ | {"MYPYPATH": str(package.parent)}, capture_output=True, text=True,
    )  # fmt: skip
    found = {int(line) for line in re.findall(r"^user\.py:(\d+): error", result.stdout, re.MULTILINE)}
    expected = {number for number, line in enumerate(PROGRAM.splitlines(), start=1) if "# error" in line}
    assert found == expected, result.stdout + result.stderr


def test_the_typed_keywords_are_the_functions() -> None:
    """The overloads name them by way of a TypedDict, with the types of the signature."""
    keywords = {
        name: parameter.annotation
        for name, parameter in inspect.signature(fastkd.kd_loss).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    del keywords["return_parts"]
    typed = {name: given.__forward_arg__ for name, given in functional._Keywords.__annotations__.items()}
    assert typed == keywords
    settings = set(inspect.signature(fastkd.KDLoss).parameters) - {"return_parts"}
    assert set(functional.Settings.__annotations__) == settings
