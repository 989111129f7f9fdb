"""Sources over slices: products of hidden states with a part of the matrix, and teachers who list a few tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from tests import reference
from tests.assertions import check_gradient, check_loss, same_bits
from tests.cases import DIVERGENCES
from tests.distributed.programs import linear_loss, sliced_loss
from tests.distributed.ranks import Ranks

ROWS, WIDTH, COLUMNS, TOKENS = 9, 16, 120, 100
KEYWORDS = {"hard_weight": 0.4, "temperature": 2.0, "vocab_size": TOKENS, "label_smoothing": 0.1, "z_loss_weight": 0.01}
TEACHERS = ("linear", "logits", "bucket", "truncate", "support", "renormalize")
# One whose value comes with the first exchange, a mixture, and one of two sides.
NAMES = ("forward_kl", "jsd(0.5)", "tvd")


def product(dtype: torch.dtype, softcap: float | None = None, bias: bool = True) -> fastkd.LinearLogits:
    hidden, weight = torch.randn(ROWS, WIDTH, dtype=dtype), torch.randn(COLUMNS, WIDTH, dtype=dtype)
    return fastkd.LinearLogits(hidden, weight, torch.randn(COLUMNS, dtype=dtype) if bias else None, 0.7, softcap)


def teacher_of(kind: str, dtype: torch.dtype) -> Any:
    if kind == "linear":
        return product(dtype, bias=False)
    logits = 3.0 * torch.randn(ROWS, COLUMNS, dtype=dtype)
    if kind == "logits":
        return logits
    return fastkd.top_k(logits[:, :TOKENS], 7, temperature=KEYWORDS["temperature"], tail=kind)


def logits_of(source: Any) -> Any:
    """In float64, as the reference takes them."""
    if isinstance(source, fastkd.TopK):
        return reference.Listed(source.ids, source.log_probs, source.tail)
    if isinstance(source, Tensor):
        return source
    x = source.hidden.double() @ source.weight.double().T
    x = source.scale * (x if source.bias is None else x + source.bias)
    return x if source.softcap is None else source.softcap * torch.tanh(x / source.softcap)


def labels_with_one_ignored() -> Tensor:
    labels = torch.randint(0, TOKENS, (ROWS,))
    labels[3] = -100
    return labels


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_products(ranks: Ranks, size: int, backend: str) -> None:
    """In chunks of four rows. Every rank has the whole gradient of the hidden states."""
    cases, names = [], []
    for name in NAMES:
        for kind in TEACHERS:
            for reduction, softcap in (("mean", None), ("none", 20.0)):
                for dtype in (torch.float32, torch.float64) if backend == "torch" else (torch.float32,):
                    keywords = KEYWORDS | {"reduction": reduction, "chunk_rows": 4, "backend": backend}
                    keywords["divergence"] = DIVERGENCES[name].argument
                    cases.append(
                        (product(dtype, softcap), teacher_of(kind, dtype), labels_with_one_ignored(), keywords)
                    )
                    names.append(name)
    results = ranks.run(linear_loss, cases, size=size)
    for name, (student, teacher, labels, keywords), *of_ranks in zip(names, cases, *results, strict=True):
        exact = student._replace(
            **{part: getattr(student, part).double().requires_grad_() for part in ("hidden", "weight", "bias")}
        )
        definition = DIVERGENCES[name].definition
        expected = reference.kd_loss(
            logits_of(exact), logits_of(teacher), labels, divergence=definition, reduction=keywords["reduction"],
            **KEYWORDS,
        ).loss  # fmt: skip
        grads = torch.autograd.grad(expected.sum(), exact[:3])
        losses, of_parts = zip(*of_ranks, strict=True)
        assert all(same_bits(loss, losses[0]) for loss in losses)
        check_loss(losses[0], expected.detach())
        for of_hidden, *_ in of_parts:
            assert same_bits(of_hidden, of_parts[0][0])
        check_gradient(of_parts[0][0], grads[0])
        for part in (1, 2):
            check_gradient(torch.cat([of_part[part] for of_part in of_parts]), grads[part])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_listed_tokens(ranks: Ranks, size: int, backend: str) -> None:
    """Of logits: ids of every slice, with some that list none of a slice's tokens, and padding."""
    cases, names = [], []
    for name in (*NAMES, "reverse_kl") if backend != "triton" else ("forward_kl",):
        for tail in ("bucket", "truncate", "support"):
            student, teacher = torch.randn(4, 40), 3.0 * torch.randn(4, 40)
            teacher[0, 10:] -= 20.0
            teacher = fastkd.top_k(teacher, 5, tail=tail)
            teacher.ids[1, 3:] = -1
            keywords = {"divergence": DIVERGENCES[name].argument, "hard_weight": 0.5, "backend": backend}
            cases.append((student, teacher, torch.tensor([3, 39, 11, 20]), keywords))
            names.append(name)
    results = ranks.run(sliced_loss, cases, size=size)
    for name, (student, teacher, labels, _), *of_ranks in zip(names, cases, *results, strict=True):
        leaf = student.double().requires_grad_()
        definition = DIVERGENCES[name].definition
        expected = reference.kd_loss(leaf, logits_of(teacher), labels, divergence=definition, hard_weight=0.5).loss
        (grad,) = torch.autograd.grad(expected, leaf)
        losses, grads = zip(*of_ranks, strict=True)
        assert all(same_bits(loss, losses[0]) for loss in losses)
        check_loss(losses[0], expected.detach())
        check_gradient(torch.cat(grads, -1), grad)


def test_products_of_half_precision(ranks: Ranks) -> None:
    """Sums over the ranks are in float32, and rounded once."""
    student = product(torch.bfloat16)
    teacher = teacher_of("linear", torch.bfloat16)
    labels = labels_with_one_ignored()
    keywords = {"hard_weight": 0.4, "backend": "torch"}
    results = ranks.run(linear_loss, [(student, teacher, labels, keywords)], size=3)
    exact = student._replace(hidden=student.hidden.double().requires_grad_())
    expected = reference.kd_loss(logits_of(exact), logits_of(teacher), labels, hard_weight=0.4).loss
    (grad,) = torch.autograd.grad(expected, exact.hidden)
    check_loss(results[0][0][0], expected.detach())
    check_gradient(results[0][0][1][0], grad)


def test_a_matrix_without_tokens(ranks: Ranks) -> None:
    student = fastkd.LinearLogits(torch.randn(5, 4), torch.randn(8, 4))
    labels = torch.tensor([0, 1, 2, 1, 0])
    keywords = {"hard_weight": 0.5, "vocab_size": 3, "backend": "torch"}
    results = ranks.run(linear_loss, [(student, student, labels, keywords)], size=4)
    exact = student._replace(hidden=student.hidden.double().requires_grad_())
    expected = reference.kd_loss(
        logits_of(exact), logits_of(student), labels, hard_weight=0.5, vocab_size=3
    ).loss  # fmt: skip
    (grad,) = torch.autograd.grad(expected, exact.hidden)
    for rank, ((loss, (of_hidden, of_weight)),) in enumerate(results):
        check_loss(loss, expected.detach())
        check_gradient(of_hidden, grad)
        assert bool((of_weight == 0).all()) == (rank > 1)
