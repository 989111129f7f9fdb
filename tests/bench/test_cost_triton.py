"""The cost model of the Triton row kernel, on loops short enough to count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastkd.bench import cost, cost_triton, docs
from fastkd.bench.cost_triton import Counted, per_column, predict

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
H100 = cost.MACHINES[0]
TWO = Counted(walks=[[160, 200], [80, 100]], specials=[[32, 32], [32, 32]], outside=500)
THREE = TWO._replace(walks=[[160, 200], [320], [80, 100]], specials=[[32, 32], [64], [32, 32]])


def test_instructions_of_a_column() -> None:
    """Ten tiles of 16 columns a thread: nine in one walk's loop, of which the label's is masked, and a ragged one."""
    columns = 10 * 4096
    assert per_column(TWO, columns, 4096, 256) == pytest.approx((500 + 9 * 240 + 2 * 300) / 160)
    assert per_column(THREE, columns, 4096, 256) == pytest.approx((500 + 9 * 240 + 10 * 320 + 2 * 300) / 160)
    assert per_column(TWO, columns, 4096, 256, specials=True) == pytest.approx(11 * 64 / 160)


def test_reads_that_l2_serves() -> None:
    short, long = (predict(H100, TWO, columns) for columns in (32000, 256000))
    assert short.kept == 1.0 and short.bytes == pytest.approx(cost.ROWS * 32000 * 6 / H100.bandwidth)
    assert long.programs == 132 and long.kept < 1.0
    assert long.bytes == pytest.approx(cost.ROWS * 256000 * (10 - 4 * long.kept) / H100.bandwidth)


def test_fewer_programs_issue_less() -> None:
    """Two walks give up SMs for L2 where that is the better bargain, three do not."""
    two, three = predict(H100, TWO, 128256), predict(H100, THREE, 128256)
    assert two.programs < 132 == three.programs
    assert two.kept == 1.0 > three.kept
    issued = cost.ROWS * 128256 * two.column / (4 * H100.clock * two.programs * 32)
    assert two.issue == pytest.approx(issued)
    assert two.of_copy == pytest.approx(min(1.0, cost.ROWS * 128256 * 6 / H100.bandwidth / issued))


def test_the_page_has_the_recorded_table() -> None:
    table = docs.table(cost_triton.table(cost_triton.recorded()))
    text = f"**Predicted, not measured:** ms of {cost.ROWS} rows\n\n{table}"
    assert f"<!-- figures: cost_triton -->\n{text}<!-- end" in PAGE.read_text()
