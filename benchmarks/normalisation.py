"""What a mean of means costs: the gradient of a step in parts, against that of all its tokens at once.

The loops' own factors are applied here as they apply them: accumulation adds up the micro-batches' gradients, data
parallelism takes the mean over the ranks. Nothing is timed: the numbers are the same everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import fastkd

WIDTH, VOCAB = 32, 500
# Tokens that count, of each rank's micro-batches.
TOKENS = ((200, 160, 120, 80), (150, 110, 90, 60))


class Loop(NamedTuple):
    name: str
    ranks: int
    micro_batches: int
    num_items: str  # an expression of `tokens`, those of the step on all ranks, and of the two numbers above
    own_factor: str = "1"  # by which the loop multiplies each loss without being asked; "1" if the caller does it all
    plain_factor: str = "1"  # what a caller multiplies a plain mean by, or the loop does if there is no num_items


LOOPS = (
    Loop("one batch", 1, 1, "None"),
    Loop("accumulation in a loop of your own: `loss.backward()`", 1, 4, "tokens", plain_factor="1 / micro_batches"),
    Loop(
        "accumulation by a framework that divides the loss: Accelerate's `accumulate`, Lightning, DeepSpeed",
        1, 4, "tokens / micro_batches", "1 / micro_batches", "1 / micro_batches",
    ),
    Loop("DDP, FSDP", 2, 1, "tokens / ranks"),
    Loop("DDP, FSDP, accumulation in a loop of your own", 2, 4, "tokens / ranks", plain_factor="1 / micro_batches"),
    Loop("Hugging Face's `Trainer(compute_loss_func=...)`, DDP", 2, 4, "tokens", own_factor="ranks"),
)  # fmt: skip


def table() -> list[list[str]]:
    lines = [["the step", "`num_items=`", "gradient off by", "with plain means"]]
    for loop in LOOPS:
        names = {"tokens": sum(map(sum, parts(loop))), "ranks": loop.ranks, "micro_batches": loop.micro_batches}
        num_items, own, plain = (eval(text, names) for text in (loop.num_items, loop.own_factor, loop.plain_factor))
        right = gradient([[sum(map(sum, parts(loop)))]], None, 1.0)
        errors = (
            float((gradient(parts(loop), *given) - right).norm() / right.norm())
            for given in ((num_items, own), (None, plain))
        )
        lines.append([loop.name, f"`{loop.num_items}`", *(f"{error:.0%}" for error in errors)])
    return lines


def parts(loop: Loop) -> list[list[int]]:
    return [list(tokens[: loop.micro_batches]) for tokens in TOKENS[: loop.ranks]]


def gradient(tokens: list[list[int]], num_items: float | None, factor: float) -> Tensor:
    """Of the output matrix: the mean over ranks of the sum over their micro-batches."""
    weight = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    counts = [count for rank in tokens for count in rank]
    hidden, teacher, labels = (rows.split(counts) for rows in step(sum(counts)))
    for part in zip(hidden, teacher, labels, strict=True):
        loss = fastkd.kd_loss(part[0] @ weight.T, *part[1:], temperature=2.0, hard_weight=0.5, num_items=num_items)
        (loss * factor / len(tokens)).backward()
    assert weight.grad is not None
    return weight.grad


def step(total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a teacher's logits and labels; ten tokens in a row have a subject in common, as a text's have."""
    generator = torch.Generator().manual_seed(1)
    subjects = torch.randn(total // 10, 1, WIDTH, generator=generator)
    hidden = (subjects + torch.randn(total // 10, 10, WIDTH, generator=generator)).flatten(0, 1)
    teacher = hidden @ torch.randn(WIDTH, VOCAB, generator=generator)
    return hidden, teacher, torch.randint(VOCAB, (total,), generator=generator)
