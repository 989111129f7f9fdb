"""What a row kernel issues for a row, from its machine code. No GPU is needed."""

from __future__ import annotations

from functools import partial

from fastkd.bench import sass
from fastkd.bench.cost_triton import Counted
from fastkd.bench.sass import Counts, Want, total

LOADS = 4  # of a turn: two vectors of each matrix
TURNS = {False: 16.0, True: 2.0}  # of a long row, unmasked and masked, so that its ways are weighed as they are there


def is_loop(turn: Counts, kind: str, masked: bool) -> bool:
    if total(turn, "LDG") != LOADS or (total(turn, "ISETP") > 2 * LOADS) != masked:
        return False
    if total(turn, "STG"):
        return kind == "gradient"
    return kind == ("sums" if total(turn, "MUFU.LG2") else "state" if total(turn, "FMNMX") else "")


def row_of(code: str, with_sums: bool) -> Counted:
    """Of a row that has digits in one walk or, with a true mixture, two, and so takes the far form.

    A walk that does not look for the label has its one masked tile outside of the loops.
    """
    kinds = [("state", False), ("state", True), ("gradient", False), ("gradient", True)]
    if with_sums:
        kinds.insert(2, ("sums", False))
    wants = [
        Want(f"{kind} {masked}", partial(is_loop, kind=kind, masked=masked), lambda turn, n=TURNS[masked]: n)
        for kind, masked in kinds
    ]
    row = sass.row(sass.parse(code), wants, {})
    turns = {kind: [turn for name, turn in row.loops if name.startswith(kind)] for kind, _ in kinds}
    walks = [sorted(found, key=total) for found in turns.values()]
    return Counted(
        [[total(turn) for turn in walk] for walk in walks],
        [[total(turn, "MUFU") for turn in walk] for walk in walks],
        total(row.outside),
    )
