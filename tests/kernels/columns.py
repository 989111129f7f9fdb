"""What a column of a whole row costs a row kernel in instructions, from its machine code. No GPU is needed."""

from __future__ import annotations

from tests.csrc.sass import INSTRUCTION, Instruction, Loop, count, innermost_loops, shortest_turn

VECTORS = 2  # of each matrix, that a thread loads in a turn


def instructions_a_column(code: str, columns: int, block: int, threads: int) -> float:
    """Of a row with labels that has digits in one walk or, with a true mixture, two, and so takes the far form.

    The unmasked tiles run the inner loops; the last tile, and the label's in the walks that look for it, the masked
    ones; what lies outside is the shortest way around the loop over rows that passes all of these.
    """
    loops = [loop for loop in innermost_loops(code) if count(loop, "LDG") == 2 * VECTORS]
    # In order: stage 1, unmasked and masked; of stage 2 the far sums, unmasked; of stage 3 the shorter form.
    state, sums = loops[:2], [loop for loop in loops[2:3] if count(loop, "MUFU.LG2")]
    gradient = sorted((loop for loop in loops if count(loop, "STG")), key=len)[:2]
    walks = [state, gradient, sums]
    exponentials = sum(count(loop, "MUFU.EX2") for walk in walks for loop in walk)
    outside = shortest_turn(row_loop(code), "MUFU.EX2", exponentials) - sum(
        len(loop) for walk in walks for loop in walk
    )
    assert outside < float("inf"), [len(loop) for loop in loops]
    tiles = columns // block
    inside = 0
    for walk in walks:
        lengths = sorted(map(len, walk))
        if len(lengths) == 2:
            inside += (tiles - 1) * lengths[0] + 2 * lengths[1]
        else:
            inside += tiles * sum(lengths)
    return (outside + inside) * threads / columns


def row_loop(code: str) -> Loop:
    """The longest loop."""
    instructions = [Instruction(int(a, 16), p, n, o) for a, p, n, o in INSTRUCTION.findall(code)]
    spans = [(i.target, i.address) for i in instructions if i.target is not None and i.target < i.address]
    first, last = max(spans, key=lambda span: span[1] - span[0])
    return [i for i in instructions if first <= i.address <= last]
