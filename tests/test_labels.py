"""Labels outside the vocabulary: an error on a CPU, and wherever one asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastkd
from fastkd import _labels
from fastkd._request import Place
from tests.cases import inputs


@pytest.mark.parametrize("label", [-1, -99, 8, 2**40])
def test_check_labels(label: int, device: str) -> None:
    labels = torch.tensor([[0, 7, label], [label, 1, 2]], device=device)
    message = (
        rf"^labels: got {label} in row 2 \(2 such rows that count\), must be in \[0, 8\), or ignore_index, or masked"
    )
    with pytest.raises(ValueError, match=message):
        fastkd.check_labels(labels, 8)


def test_check_labels_of_rows_that_count(device: str) -> None:
    labels = torch.tensor([-100, 3, 9, 8], device=device)
    mask = torch.tensor([True, True, False, True], device=device)
    with pytest.raises(ValueError, match="got 8 in row 3"):
        fastkd.check_labels(labels, 8, mask=mask)
    fastkd.check_labels(labels, 9, mask=mask)
    fastkd.check_labels(labels, 9, ignore_index=9, mask=labels != -100)
    with pytest.raises(ValueError, match="got -100 in row 0"):
        fastkd.check_labels(labels, 10, ignore_index=9)


def test_check_labels_of_what_is_none() -> None:
    for labels in ([1, 2], torch.tensor([1.0, 2.0])):
        with pytest.raises(TypeError, match=r"^labels: got (list|torch.float32), must be an int64 tensor"):
            fastkd.check_labels(labels, 8)  # type: ignore[arg-type]
    for mask in (torch.ones(3, 1, dtype=torch.bool), torch.ones(3)):
        with pytest.raises(ValueError, match=r"^mask: got torch.*, must be bool \(3,\), as labels are"):
            fastkd.check_labels(torch.tensor([1, 2, 3]), 8, mask=mask)
    with pytest.raises(TypeError, match=r"^mask: got list, must be a tensor"):
        fastkd.check_labels(torch.tensor([1]), 8, mask=[True])  # type: ignore[arg-type]


def test_check_labels_of_nothing(device: str) -> None:
    fastkd.check_labels(torch.empty(0, dtype=torch.int64, device=device), 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU a check would synchronise: tests/gpu")
@pytest.mark.parametrize("hard_weight", [0.5, 1.0])
@pytest.mark.parametrize("label", [-1, 127, 10**9])
def test_kd_loss_raises_on_a_cpu(backend: str, label: int, hard_weight: float) -> None:
    student, teacher, labels = inputs((4,), 127)
    labels[2] = label
    for reduction in ("mean", "none"):
        with pytest.raises(ValueError, match=rf"^labels: got {label} in row 2"):
            fastkd.kd_loss(student, teacher, labels, hard_weight=hard_weight, reduction=reduction, backend=backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU a check would synchronise: tests/gpu")
def test_labels_end_at_the_vocabulary(backend: str) -> None:
    """A padding column is no token, so not a label."""
    student, teacher, labels = inputs((2,), 127)
    labels[0], labels[1] = 99, 100
    with pytest.raises(ValueError, match=r"^labels: got 100 in row 1 .* must be in \[0, 100\)"):
        fastkd.kd_loss(student, teacher, labels, hard_weight=1.0, vocab_size=100, backend=backend)


@pytest.mark.parametrize("label", [-1, 100, 10**9])
def test_a_row_without_a_token_is_nan_where_nobody_looks(
    label: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; nothing is read outside the row, and the other rows are right."""
    student, teacher, labels = inputs((3,), 127, device=device)
    labels %= 100
    scales, spec = torch.rand(2, 3, device=device), (2.0, 0, 1.0, 0.0, 0.0, 0.1, 100, None)
    operator = torch.ops.fastkd.kd_rows
    right = operator(student, teacher, labels, *scales, None, *spec, True, *Place("triton"))
    labels[1] = label
    monkeypatch.setattr(_labels, "check_rows", lambda *_: None)
    hard, soft, _, grad = operator(student, teacher, labels, *scales, None, *spec, True, *Place("triton"))
    others = [0, 2]
    assert hard[1].isnan() and grad[1, :100].isnan().all() and not grad[1, 100:].any()
    assert torch.equal(hard[others], right[0][others]) and torch.equal(grad[others], right[3][others])
    assert torch.equal(soft, right[1])


def test_labels_that_only_mask(backend: str, device: str) -> None:
    """Without a hard term a label other than ignore_index says that its row counts; it is not looked up."""
    student, teacher, labels = inputs((3,), 127, device=device)
    labels[0], labels[1] = -100, 10**9
    counts = labels != -100
    masked = fastkd.kd_loss(student, teacher, labels, hard_weight=0.0, backend=backend)
    assert torch.equal(masked, fastkd.kd_loss(student, teacher, mask=counts, backend=backend))


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("0", False), ("1", True)])
def test_environment_switch(value: str | None, expected: bool) -> None:
    """Read when the package is imported."""
    environment = {name: text for name, text in os.environ.items() if name != "FASTKD_CHECK_LABELS"}
    environment |= {} if value is None else {"FASTKD_CHECK_LABELS": value}
    command = [sys.executable, "-c", "from fastkd import _labels; print(_labels.ALWAYS)"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.strip() == str(expected)
