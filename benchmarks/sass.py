"""What a disassembled kernel issues for a row, counted without a GPU.

A row is a way through the machine code: through as many loops as it is said to pass, and what lies between them. Of
all ways forward the one that issues least is taken: that of a row without special cases. So a ragged end, the label's
column or a row near convergence are not in it, nor what a warp runs whose threads have come apart (BRA.DIV), nor
subroutines. A loop counts by the shortest way around it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from operator import add
from typing import NamedTuple

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/ +(?:(@!?U?P\w+) )?(\S+)([^;]*);")
VECTOR = 16  # bytes
Counts = Counter[str]  # by the whole names of instructions


class Instruction(NamedTuple):
    address: int
    predicate: str
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes that threads take together."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name.startswith("BRA") else None
        return int(found[1], 16) if found and not self.name.startswith("BRA.DIV") else None

    @property
    def ends(self) -> bool:
        """Whether the next instruction is never its successor."""
        jumps = self.name.startswith(("EXIT", "RET")) or self.target is not None
        return jumps and not self.predicate and "P" not in self.operands


class Code:
    """A kernel's machine code."""

    def __init__(self, text: str) -> None:
        self.instructions = [Instruction(int(a, 16), p, n, o) for a, p, n, o in INSTRUCTION.findall(text)]
        at = {instruction.address: index for index, instruction in enumerate(self.instructions)}
        self.following: list[list[int]] = []  # of each, the indices of those that may come next
        for index, instruction in enumerate(self.instructions):
            ends = instruction.ends or index + 1 == len(self.instructions)
            target = instruction.target
            self.following.append(([] if ends else [index + 1]) + ([] if target is None else [at[target]]))

        self.entries = Counter(then for following in self.following for then in following)

    def run(self, index: int, last: int) -> int:
        """The end of the instructions from this one on, to ``last`` at most, that always follow each other."""
        while index < last and self.following[index] == [index + 1] and self.entries[index + 1] == 1:
            index += 1
        return index

    def spans(self) -> list[tuple[int, int]]:
        """(first, last) of what lies between a branch back that is ever reached and its target."""
        reached, waiting = {0}, [0]
        while waiting:
            fresh = {then for then in self.following[waiting.pop()] if then not in reached}
            reached |= fresh
            waiting += fresh
        return [(then, index) for index in reached for then in self.following[index] if then <= index]


class Loop(NamedTuple):
    first: int  # indices of instructions
    last: int
    turn: Counts


class Want(NamedTuple):
    """Loops that a row passes."""

    name: str
    is_one: Callable[[Counts], bool]  # by what a turn issues
    turns: Callable[[Counts], float]
    times: int = 1  # so many different ones


class Row(NamedTuple):
    loops: list[tuple[str, Counts]]  # a turn of each, in order
    outside: Counts


def total(counts: Counts, *prefixes: str) -> int:
    """Of the instructions whose names begin so; of all without a prefix."""
    return sum(n for name, n in counts.items() if not prefixes or name.startswith(prefixes))


def innermost_loops(code: Code) -> list[Loop]:
    found = code.spans()
    inner = [(a, b) for a, b in found if not any((c, d) != (a, b) and a <= c and d <= b for c, d in found)]
    return [Loop(a, b, cheapest(code, a, b, {}, (), {}).outside) for a, b in inner]


def row(code: Code, wants: Iterable[Want], passes: dict[str, int]) -> Row:
    """The cheapest way through the kernel, or once around the loop over rows if it has one.

    ``passes``: at how many instructions, outside of the loops, of a name that begins so, it must come by at least.

    Raises:
        ValueError: there is none.
    """
    wants = tuple(wants)
    loops: dict[int, tuple[Loop, Want]] = {}
    for loop in innermost_loops(code):
        kind = next((want for want in wants if want.is_one(loop.turn)), None)
        if kind is not None:
            loops[loop.first] = loop, kind

    def holds_all(first: int, last: int) -> bool:
        inside = {want.name for loop, want in loops.values() if first < loop.first and loop.last < last}
        return inside == {want.name for want in wants}

    # The outermost loop begins first; others that hold as much only come back from a wait that is out of the way.
    first, last = min((span for span in code.spans() if holds_all(*span)), default=(0, len(code.instructions) - 1))
    return cheapest(code, first, last, loops, wants, passes)


def cheapest(
    code: Code,
    first: int,
    last: int,
    loops: dict[int, tuple[Loop, Want]],
    wants: tuple[Want, ...],
    passes: dict[str, int],
) -> Row:
    """From ``first`` to ``last`` or an exit, forwards only."""
    goal = (*(want.times for want in wants), *passes.values())
    # By index, and by how much of the goal is reached: (issued before, index and state before).
    Before = tuple[float, tuple[int, tuple[int, ...]] | None]
    ways: dict[int, dict[tuple[int, ...], Before]] = {first: {(0,) * len(goal): (0.0, None)}}
    ends: list[tuple[float, int, tuple[int, ...]]] = []
    for index in range(first, last + 1):
        here = ways.get(index, {})
        if not here:
            continue
        if index in loops:
            loop, want = loops[index]
            end, cost = loop.last, want.turns(loop.turn) * total(loop.turn)
            nexts = {then for i in range(index, end + 1) for then in code.following[i] if then > end}
            reached = [i == wants.index(want) for i in range(len(goal))]
        else:
            end = code.run(index, last)
            cost = end + 1.0 - index
            nexts = {then for then in code.following[end] if then > end}
            names = [instruction.name for instruction in code.instructions[index : end + 1]]
            reached = [0] * len(wants) + [sum(name.startswith(prefix) for name in names) for prefix in passes]
        for state, (issued, _) in here.items():
            after = tuple(map(min, map(add, state, reached), goal)) if any(reached) else state
            if end == last or not code.following[end]:
                if after == goal:
                    ends.append((issued + cost, index, state))
                continue
            for then in nexts:
                known = ways.setdefault(then, {}).get(after)
                if known is None or issued + cost < known[0]:
                    ways[then][after] = issued + cost, (index, state)
    if not ends:
        raise ValueError(f"no way passes {[want.name for want in wants]} and {passes}")
    found: list[tuple[str, Counts]] = []
    outside: Counts = Counter()
    _, *step = min(ends)
    while True:
        index, state = step
        if index in loops:
            loop, want = loops[index]
            found.insert(0, (want.name, loop.turn))
        else:
            outside.update(i.name for i in code.instructions[index : code.run(index, last) + 1])
        before = ways[index][state][1]
        if before is None:
            return Row(found, outside)
        step = list(before)
