"""What a loop of a disassembled kernel costs, counted without a GPU."""

from __future__ import annotations

import re
from typing import NamedTuple

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/ +(?:(@!?U?P\w+) )?(\S+)([^;]*);")


class Instruction(NamedTuple):
    address: int
    predicate: str
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name.startswith("BRA") else None
        return int(found[1], 16) if found else None


Loop = list[Instruction]


def loops(code: str) -> list[Loop]:
    instructions = [Instruction(int(a, 16), p, n, o) for a, p, n, o in INSTRUCTION.findall(code)]
    spans = [(i.target, i.address) for i in instructions if i.target is not None and i.target < i.address]
    return [[i for i in instructions if first <= i.address <= last] for first, last in spans]


def innermost_loops(code: str) -> list[Loop]:
    every = loops(code)
    spans = [(loop[0].address, loop[-1].address) for loop in every]
    return [
        loop
        for loop, (a, b) in zip(every, spans, strict=True)
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)
    ]


def count(loop: Loop, name: str) -> int:
    return sum(instruction.name.startswith(name) for instruction in loop)


def shortest_turn(loop: Loop, name: str, times: int) -> float:
    """Instructions of the shortest way around a loop that passes ``times`` of those called ``name``.

    So what is skipped in nearly every turn, a ragged end or the label's column, is not counted.
    """
    at = {instruction.address: index for index, instruction in enumerate(loop)}
    ways: list[dict[int, int]] = [{} for _ in loop]  # passed so far: instructions so far
    ways[0][0] = 0
    for index, instruction in enumerate(loop[:-1]):
        nexts = [] if instruction.name == "EXIT" and not instruction.predicate else [index + 1]
        if instruction.target is not None:
            nexts = nexts if instruction.predicate else []
            nexts += [at[instruction.target]] if instruction.target in at else []
        for passed, length in ways[index].items():
            passed += instruction.name.startswith(name)
            for following in nexts:
                ways[following][passed] = min(length + 1, ways[following].get(passed, length + 1))
    return 1 + min((length for passed, length in ways[-1].items() if passed >= times), default=float("inf"))
