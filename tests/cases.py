"""The grid: sizes, dtypes, temperatures, divergences and memory layouts, and the tensors made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd
from fastkd import Divergence
from tests import reference

# Vocabulary sizes, and the regime that each covers. A tile of the kernels in float32, of rows as short, is at most
# 2048 columns.
ONE_TILE = 2048
SIZES = (
    1,  # one token: every loss is 0
    2,  # the smallest softmax
    7,  # less than a vector load
    127,  # a partial smallest tile
    128,  # the smallest tile, full
    1000,  # a partial tile between powers of two
    2047,  # one column short of a full tile
    ONE_TILE,  # one full tile and no remainder
    2049,  # a remainder of one column
    4096,  # two full tiles
    4099,  # several tiles, rows that start off a 16-byte boundary
    6151,  # odd: every row has another alignment; tiles before and behind the unmasked ones
)
# GPT-2's vocabulary (odd, unaligned rows) and Qwen's (large, aligned): seconds a row in an interpreter, so few cases.
GPT2, QWEN = 50257, 151936

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (student, teacher)
DTYPE_PAIRS = (
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
)

# 1 to 4 are integer powers of one exponential in the kernels; 0.5 and 1.7 are not.
TEMPERATURES = (1.0, 2.0, 3.0, 4.0, 0.5, 1.7)


class Member(NamedTuple):
    """A divergence as the package takes it, and its definition."""

    argument: str | Divergence
    definition: reference.Divergence


DIVERGENCES = {
    "forward_kl": Member("forward_kl", reference.forward_kl),
    "reverse_kl": Member("reverse_kl", reference.reverse_kl),
    "cross_entropy": Member("cross_entropy", reference.cross_entropy),
    "tvd": Member("tvd", reference.tvd),
    "jsd(0.1)": Member(fastkd.JSD(0.1), reference.jsd(0.1)),
    "jsd(0.5)": Member(fastkd.JSD(0.5), reference.jsd(0.5)),
    "jsd(0.9)": Member(fastkd.JSD(0.9), reference.jsd(0.9)),
    "skew_kl(0.1)": Member(fastkd.SkewKL(0.1), reference.skew_kl(0.1)),
    "skew_reverse_kl(0.1)": Member(fastkd.SkewReverseKL(0.1), reference.skew_reverse_kl(0.1)),
    "symmetric_kl(0.3)": Member(fastkd.SymmetricKL(0.3), reference.symmetric_kl(0.3)),
    "mine": Member(Divergence("mine", c_t=0.3, c_s=0.7, w=0.25), reference.family(0.3, 0.7, 0.25)),
}
# One of each structure (is the mixture the student, the teacher or both) and of each formula.
STRUCTURES = ("forward_kl", "reverse_kl", "cross_entropy", "tvd", "jsd(0.5)", "symmetric_kl(0.3)")


class Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor
    labels: Tensor


def inputs(
    rows: tuple[int, ...],
    columns: int,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    device: str | None = None,
    spread: float = 3.0,
) -> Inputs:
    """Random logits with a standard deviation of ``spread``, and labels, from the test's seed (see conftest)."""
    student, teacher = (torch.randn(*rows, columns) * spread for _ in range(2))
    labels = torch.randint(0, columns, rows)
    return Inputs(
        student.to(device, dtype),
        teacher.to(device, dtype if teacher_dtype is None else teacher_dtype),
        labels.to(device),
    )


def padded_rows(logits: Tensor, padding: int = 3) -> Tensor:
    """The same values with ``padding`` NaN columns behind each row: a view with a longer row stride."""
    store = logits.new_full((*logits.shape[:-1], logits.shape[-1] + padding), torch.nan)
    store[..., : logits.shape[-1]] = logits
    return store[..., : logits.shape[-1]]


def offset(logits: Tensor, elements: int) -> Tensor:
    """The same values ``elements`` behind the start of their memory: a misaligned base."""
    store = logits.new_full((logits.numel() + elements,), torch.nan)
    store[elements:] = logits.reshape(-1)
    return store[elements:].view(logits.shape)


def without_last(logits: Tensor) -> Tensor:
    """The same values as ``longer[:, :-1]`` of a longer sequence: rows in groups."""
    store = logits.new_full((logits.shape[0], logits.shape[1] + 1, logits.shape[2]), torch.nan)
    store[:, :-1] = logits
    return store[:, :-1]


def batch_second(logits: Tensor) -> Tensor:
    """The same values as a transposed [S, B, V]."""
    return logits.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


def columns_first(logits: Tensor) -> Tensor:
    """The same values with a last stride that is not 1, which no kernel walks: it is copied."""
    return logits.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda logits: logits,
    "without_last": without_last,
    "batch_second": batch_second,
    "padded_rows": padded_rows,
    "padded_rows_aligned": lambda logits: padded_rows(logits, 16 - logits.shape[-1] % 16),
    "columns_first": columns_first,
    **{f"offset_{elements}": lambda logits, elements=elements: offset(logits, elements) for elements in (1, 3, 7)},
}


def keywords(name: str) -> dict[str, Any]:
    """Both weights and a temperature, with divergence ``name``: every part of the loss is there."""
    return {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7, "divergence": DIVERGENCES[name].argument}
