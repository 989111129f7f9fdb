"""The cases: what is computed, on which shape and dtype; their inputs, and the bytes that they must move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

TEMPERATURE, HARD_WEIGHT, SOFT_WEIGHT = 2.0, 0.5, 0.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VOCABULARIES = (32000, 50257, 128256, 151936, 256000)
HIDDEN = 1024  # width of hidden states
HIDDEN_STATES, HIDDEN_LAYERS = "hidden states + backward", "hidden layers + backward"
TOP_K = "top-k + backward"


class Inputs(NamedTuple):
    student: Tensor  # [rows, vocab], or hidden states [rows, HIDDEN]; requires a gradient
    teacher: Tensor  # likewise; or log-probabilities [rows, k] of a top k
    labels: Tensor  # [rows]
    grad_output: Tensor  # of the loss: 0-d; of log-probabilities: [rows, vocab]
    heads: tuple[Tensor, ...] = ()  # output matrices of student and teacher [vocab, HIDDEN], with hidden states
    ids: Tensor | None = None  # [rows, k] of a top k

    def logits(self) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's, [rows, vocab]."""
        if not self.heads:
            return self.student, self.teacher
        return self.student @ self.heads[0].T, self.teacher @ self.heads[1].T


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    rows: int
    vocab: int
    dtype: str = "bfloat16"
    # or "loss", with no gradient asked for; "log_softmax", with its backward; "hidden states + backward", the loss from
    # what comes before the output matrices, with the gradients of the student's two; "hidden layers + backward", the
    # mean squared difference of states of width ``vocab``; "top-k + backward", the loss of a teacher's k most probable
    # tokens, the others being one outcome
    kind: str = "loss + backward"
    divergence: str = "forward_kl"  # or "reverse_kl", "jsd" (beta = 0.5)
    terms: str = "both"  # or "hard", "soft"
    grad_output: float = 1.0
    inplace: bool = False
    k: int = 0  # of a top k

    @property
    def name(self) -> str:
        """``loss + backward, 1024 x 32000, float32``, and what is not the default."""
        changes = {
            self.divergence: self.divergence != "forward_kl",
            f"{self.terms} only": self.terms != "both",
            f"grad_output {self.grad_output}": self.grad_output != 1.0,
            "in place": self.inplace,
            f"k = {self.k}": self.k > 0,
        }
        changed = [change for change, is_one in changes.items() if is_one]
        return ", ".join([self.kind, f"{self.rows} x {self.vocab}", self.dtype, *changed])

    @property
    def bytes(self) -> int:
        """Read each input once, write each output once."""
        if self.kind == HIDDEN_STATES:
            return 3 * (self.rows + self.vocab) * HIDDEN * DTYPES[self.dtype].itemsize
        kinds = {"loss + backward": 3, "loss": 2, "log_softmax": 2 + 3, HIDDEN_LAYERS: 3, TOP_K: 2}
        tensors = kinds[self.kind] - (self.terms == "hard" and self.kind != TOP_K)
        return tensors * self.rows * self.vocab * DTYPES[self.dtype].itemsize

    def inputs(self, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": device}
        options_2d = {**options, "dtype": DTYPES[self.dtype]}
        if self.kind == HIDDEN_STATES:
            student, teacher = (torch.randn(self.rows, HIDDEN, **options_2d) for _ in range(2))
            heads = tuple(torch.randn(self.vocab, HIDDEN, **options_2d).mul_(3.0 * HIDDEN**-0.5) for _ in range(2))
            heads[0].requires_grad_()
        else:
            student, teacher = (torch.randn(self.rows, self.vocab, **options_2d).mul_(3.0) for _ in range(2))
            heads = ()
        ids = None
        if self.kind == TOP_K:
            teacher, ids = torch.log_softmax(teacher.float() / TEMPERATURE, -1).topk(self.k)
        labels = torch.randint(self.vocab, (self.rows,), **options)
        if self.kind == "log_softmax":
            grad_output = torch.randn(self.rows, self.vocab, **options_2d)
        else:
            grad_output = torch.tensor(self.grad_output, device=device)
        return Inputs(student.requires_grad_(self.kind != "loss"), teacher, labels, grad_output, heads, ids)

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.bytes, **asdict(self)}


def quick(device: str) -> Iterator[Case]:
    """The default set: three minutes on two CPU cores, or five on a GPU. What matters most comes first."""
    if device == "cpu":
        for (rows, vocab), dtype in product(((1024, 32000), (256, 128256)), ("float32", "bfloat16")):
            yield Case(rows, vocab, dtype)
        yield Case(4, 1000, "float32")
        return
    yield Case(4096, 128256)
    yield Case(4, 1000, "float32")
    for vocab in VOCABULARIES:
        yield Case(4096, vocab)
    yield Case(4096, 128256, "float32")
    for kind in ("loss", "log_softmax", HIDDEN_STATES):
        yield Case(4096, 128256, kind=kind)
    for rows in (1, 64):
        yield Case(rows, 128256)


def full(device: str) -> Iterator[Case]:
    """Every dimension varied about the quick set."""
    yield from quick(device)
    rows = 64 if device == "cpu" else 4096
    for kind, vocab, dtype in product(("loss + backward", "loss", "log_softmax"), VOCABULARIES, DTYPES):
        yield Case(rows, vocab, dtype, kind)
    for divergence, terms in (("reverse_kl", "both"), ("jsd", "both"), ("forward_kl", "hard"), ("forward_kl", "soft")):
        yield Case(rows, 128256, divergence=divergence, terms=terms)
    for terms in ("both", "soft", "hard"):
        # Many CPUs multiply matrices of bfloat16 very slowly.
        shape = (2048, 32000, "float32") if device == "cpu" else (8192, 128256, "bfloat16")
        yield Case(*shape, kind=HIDDEN_STATES, terms=terms)
    yield Case(rows, 128256, grad_output=0.5)
    yield Case(rows, 128256, inplace=True)
    for count in (1, 4, 16, 64, 256, 1024) if device == "cpu" else (1, 8, 64, 512, 16384):
        yield Case(count, 128256)


def hidden_layers() -> Iterator[Case]:
    """BERT's width, and that of a model of 7 billion parameters."""
    for width, dtype in product((768, 4096), ("float32", "bfloat16")):
        yield Case(4096, width, dtype, HIDDEN_LAYERS)


def top_k(device: str) -> Iterator[Case]:
    """Beside the dense loss of this shape, which the quick set has."""
    for k in (8, 64, 256):
        yield Case(*((1024, 32000, "float32") if device == "cpu" else (4096, 128256)), kind=TOP_K, k=k)


def select(device: str, everything: bool) -> list[Case]:
    return list(dict.fromkeys([*(full if everything else quick)(device), *hidden_layers(), *top_k(device)]))
