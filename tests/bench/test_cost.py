"""The cost model, on machine code short enough to count by hand."""

from __future__ import annotations

import pytest

from fastkd.bench import cost, docs, sass
from fastkd.bench.cost import Grid, Issued, Kernel, Loop, Machine
from fastkd.bench.sass import Want, total


def code(*lines: str) -> sass.Code:
    """Instructions 16 bytes apart."""
    return sass.Code("\n".join(f"        /*{16 * index:04x}*/  {line} ;" for index, line in enumerate(lines)))


EXPONENTIALS = Want("sums", lambda turn: total(turn, "MUFU.EX2") > 0, lambda turn: 10.0)
STORES = Want("gradient", lambda turn: total(turn, "STG") > 0, lambda turn: 10.0)


def test_a_row_skips_what_it_need_not_do() -> None:
    row = sass.row(
        code(
            "MOV R1, R2",
            "@P0 BRA 0x40",  # past the rare case
            "IMAD R1, R2, R3, R4",
            "IMAD R1, R2, R3, R4",
            "BRA.DIV UR4, 0xb0",  # not taken by threads that are together
            "MUFU.EX2 R1, R2",  # 0x50: the loop
            "@P1 BRA 0x80",
            "FADD R1, R2, R3",
            "FADD R1, R2, R3",
            "@!P0 BRA 0x50",
            "EXIT",
            "BRA 0x50",
        ),
        [EXPONENTIALS],
        {},
    )
    ((name, turn),) = row.loops
    assert name == "sums" and total(turn) == 4 and turn["FADD"] == 1
    assert total(row.outside) == 4 and total(row.outside, "BRA") == 2 and not row.outside["IMAD"]


def test_a_row_passes_what_it_is_told_to() -> None:
    lines = ("@P0 BRA 0x30", "MUFU.RCP R1, R2", "FADD R1, R2, R3", "MUFU.EX2 R1, R2", "@P1 BRA 0x30", "EXIT")
    assert total(sass.row(code(*lines), [EXPONENTIALS], {}).outside) == 2
    assert total(sass.row(code(*lines), [EXPONENTIALS], {"MUFU.RCP": 1}).outside) == 4
    with pytest.raises(ValueError, match="no way"):
        sass.row(code(*lines), [EXPONENTIALS], {"MUFU.RCP": 2})


def test_a_row_of_several_is_once_around_their_loop() -> None:
    """And of two loops of a kind the cheaper, unless both are asked for."""
    lines = (
        "MOV R1, R2",
        "MOV R1, R2",  # 0x10: a row
        "@P0 BRA 0x60",
        "MUFU.EX2 R1, R2",  # 0x30
        "FADD R1, R2, R3",
        "@P1 BRA 0x30",
        "MUFU.EX2 R1, R2",  # 0x60
        "@P1 BRA 0x60",
        "STG.E.128 [R2], R4",  # 0x80
        "@P1 BRA 0x80",
        "@P2 BRA 0x10",
        "EXIT",
    )
    row = sass.row(code(*lines), [EXPONENTIALS, STORES], {})
    assert [(name, total(turn)) for name, turn in row.loops] == [("sums", 2), ("gradient", 2)]
    assert total(row.outside) == 3
    both = sass.row(code(*lines), [EXPONENTIALS._replace(times=2), STORES], {})
    assert [total(turn) for _, turn in both.loops] == [3, 2, 2]


NOTHING = Issued(0, 0)


def kernel(gradient: Issued, warp: Issued = NOTHING) -> Kernel:
    return Kernel((Loop("gradient", 8, gradient),), warp, warp, exchanges=1, registers=64)


def test_everything_that_is_issued_is_counted() -> None:
    """1000 columns of two blocks of 64 threads: two turns of a warp each, of 256 columns."""
    grid = Grid(cluster=2, threads=64, shared=1 << 10)
    one = kernel(Issued(100, 10), warp=Issued(7, 1))
    assert cost.per_column(one, grid, 1000) == pytest.approx(32 * (2 * 2 * 100 + 2 * 2 * 7) / 1000)
    assert cost.per_column(one._replace(first_warp=Issued(10, 1)), grid, 1000) == pytest.approx(32 * 434 / 1000)


def test_the_slowest_bound_decides() -> None:
    machine = Machine("a GPU", bandwidth=3e12)
    grid = Grid(cluster=1, threads=256, shared=32 << 10)
    light, heavy, special = (kernel(Issued(*issued)) for issued in ((8, 0), (8000, 0), (1000, 1000)))
    by_bytes, by_issue, by_specials = (cost.predict(machine, one, grid, 8192, 6) for one in (light, heavy, special))
    assert by_bytes.seconds == by_bytes.bytes * by_bytes.idle > by_bytes.issue
    assert by_bytes.bytes == pytest.approx(cost.ROWS * 8192 * 6 / 3e12)
    assert by_issue.issue == pytest.approx(cost.ROWS * 32 * 8000 / (4 * machine.clock * 132))
    assert by_issue.seconds == by_issue.issue * by_issue.idle
    alone = cost.predict(machine, heavy, grid._replace(shared=120 << 10), 8192, 6)  # an SM holds one such block
    assert alone.seconds == alone.waits * alone.idle > 1.9 * by_issue.seconds
    assert by_specials.specials == pytest.approx(8 * by_specials.issue)
    assert by_specials.of_copy == by_specials.bytes / by_specials.seconds < 0.1


def test_blocks_of_an_sm_and_clusters_of_its_groups() -> None:
    assert Grid(8, 256, 64 << 10).blocks(80) == 3
    assert Grid(8, 256, 64 << 10).blocks(128) == 2  # registers
    assert Grid(16, 256, 120 << 10).blocks(80) == 1  # shared memory
    assert Grid(1, 256, 0).blocks(32) == 8  # threads
    assert sum(cost.GROUPS) == 132
    whole, ragged = (cost.predict(cost.MACHINES[0], kernel(Issued(8, 0)), Grid(1, 256, 100 << 10), 8192, 6, rows)
                     for rows in (264, 265))  # fmt: skip
    assert whole.idle == 1 and ragged.idle == pytest.approx(2 * 264 / 265)


def test_the_documented_predictions_are_headed_so() -> None:
    page = (docs.ROOT / "docs" / "performance.md").read_text()
    assert "predicted, not measured" in docs.blocks()["cost"].lower()
    assert docs.blocks()["cost"] in page
    assert all(assumption in page for assumption in ("1.755 GHz", "3.0 TB/s", "4.3 TB/s"))
