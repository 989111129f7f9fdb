"""docs/distributed.md says what N ranks do to get the gradient of one. Each row of its table runs."""

from __future__ import annotations

import pytest
import torch

import fastkd
from tests.distributed import scaling
from tests.distributed.ranks import ROOT, Ranks

CASES = [(row, size) for row, (_, sizes) in scaling.ROWS.items() for size in sizes]


def test_the_table_is_what_is_tested() -> None:
    page = (ROOT / "docs" / "distributed.md").read_text()
    table = page[page.index("| ranks share") :].partition("\n\n")[0].splitlines()[2:]
    assert [line.split("|")[1].strip() for line in table] == list(scaling.ROWS)


@pytest.mark.parametrize(("row", "size"), CASES)
def test_ranks_have_the_gradient_of_one(ranks: Ranks, row: str, size: int) -> None:
    program, _ = scaling.ROWS[row]
    expected = scaling.alone()
    for found in ranks.run(program, size=size):
        assert set(found) == set(expected)
        for name, grad in expected.items():
            assert grad.norm() > 0
            assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_of_one_process() -> None:
    labels = torch.tensor([[3, -100], [5, 6]])
    assert fastkd.global_items(labels).item() == 3
    assert fastkd.global_items(labels, mask=torch.tensor([[True, True], [False, True]])).item() == 2
    assert fastkd.global_items(labels, ignore_index=5).item() == 3
    with pytest.raises(TypeError, match=r"labels: got torch\.float32"):
        fastkd.global_items(labels.float())
    with pytest.raises(ValueError, match=r"mask: got torch\.int64"):
        fastkd.global_items(labels, mask=labels)
