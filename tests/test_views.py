"""Rows of any leading shape as [B, S, V], without a copy wherever strides allow it."""

from __future__ import annotations

import pytest
import torch

from fastkd._views import flat, row_views
from tests.cases import LAYOUTS

COPIED = ("columns_first",)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_values(layout: str) -> None:
    logits = LAYOUTS[layout](torch.randn(2, 3, 5))
    (view,) = row_views(logits)
    assert view.dim() == 3
    assert view.stride(-1) == 1
    assert torch.equal(view.reshape(6, 5), logits.reshape(6, 5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_memory(layout: str) -> None:
    logits = LAYOUTS[layout](torch.randn(2, 3, 5))
    (view,) = row_views(logits)
    assert (view.data_ptr() == logits.data_ptr()) == (layout not in COPIED)


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_together(first: str, second: str) -> None:
    """Tensors walked together group their rows alike, and columns may differ in number."""
    given = LAYOUTS[first](torch.randn(2, 3, 5)), LAYOUTS[second](torch.randn(2, 3, 7))
    views = row_views(*given)
    assert views[0].shape[:2] == views[1].shape[:2]
    for view, logits in zip(views, given, strict=True):
        assert view.stride(-1) == 1
        assert torch.equal(view.reshape(6, -1), logits.reshape(6, -1))


@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 5), (2, 3, 4, 5)], ids=str)
def test_contiguous_rows_are_one_group(shape: tuple[int, ...]) -> None:
    (view,) = row_views(torch.randn(shape))
    assert view.shape == (1, torch.Size(shape[:-1]).numel(), 5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 5)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_no_rows(shape: tuple[int, ...], transposed: bool) -> None:
    logits = torch.randn(shape)
    (view,) = row_views(logits.transpose(0, 1) if transposed and len(shape) == 3 else logits)
    assert view.numel() == 0
    assert view.dim() == 3


def test_four_dimensions() -> None:
    """Too many strides for two: copied, right all the same."""
    logits = torch.randn(4, 3, 2, 5).transpose(0, 2)
    (view,) = row_views(logits)
    assert torch.equal(view.reshape(-1, 5), logits.reshape(-1, 5))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
def test_flat(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    assert flat(values).data_ptr() == values.data_ptr()
    assert torch.equal(flat(values), values.reshape(-1))


def test_flat_of_strides() -> None:
    for values in (torch.randn(6)[::2], torch.randn(3, 2).t(), torch.randn(1).expand(4)):
        assert flat(values).is_contiguous()
        assert torch.equal(flat(values), values.reshape(-1))
