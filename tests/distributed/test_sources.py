"""Sources over slices: products of hidden states with a part of the matrix, and teachers who list a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd._validate import TAILS
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


Case = tuple[str, Tensor, fastkd.TopK, "Tensor | None", dict[str, Any]]  # the divergence's name, and a call


def check_listed(ranks: Ranks, size: int, cases: list[Case], compare: Callable[..., None]) -> None:
    calls = [
        (student, teacher, labels, keywords | {"divergence": DIVERGENCES[name].argument})
        for name, student, teacher, labels, keywords in cases
    ]
    results = ranks.run(sliced_loss, calls, size=size)
    for (name, student, teacher, labels, keywords), call, *of_ranks in zip(cases, calls, *results, strict=True):
        leaf = student.double().requires_grad_()
        exact = {key: value for key, value in keywords.items() if key not in ("backend", "inplace_backward")}
        exact["divergence"] = DIVERGENCES[name].definition
        expected = reference.kd_loss(leaf, logits_of(teacher), labels, **exact).loss
        (grad,) = torch.autograd.grad(expected.sum(), leaf)
        losses, grads = zip(*of_ranks, strict=True)
        try:
            assert all(same_bits(loss, losses[0]) for loss in losses)
            compare(losses[0], torch.cat(grads, -1), expected.detach(), grad, call)
        except AssertionError as error:
            raise AssertionError(f"{name}, {teacher.tail}, {keywords}: {error}") from error


def agree(loss: Tensor, grad: Tensor, expected: Tensor, expected_grad: Tensor, call: Any) -> None:
    check_loss(loss, expected)
    check_gradient(grad, expected_grad)


def no_worse_than_whole(loss: Tensor, grad: Tensor, expected: Tensor, expected_grad: Tensor, call: Any) -> None:
    """Where float32 has few digits: at most twice the error that one process has, and the tolerance."""
    student, teacher, labels, keywords = call
    leaf = student.clone().requires_grad_()
    whole = fastkd.kd_loss(leaf, teacher, labels, **keywords)
    (whole_grad,) = torch.autograd.grad(whole.sum(), leaf)
    for ours, theirs, exact in ((loss, whole.detach(), expected), (grad, whole_grad, expected_grad)):
        error, of_whole = ((x.double() - exact).norm() / exact.norm() for x in (ours, theirs))
        assert error <= 2.0 * of_whole + 1e-5, f"error {error:.1e}, {of_whole:.1e} of one process"


# A teacher without mass of the rest has no reverse KL.
LISTED = [
    (name, tail)
    for name in DIVERGENCES
    for tail in TAILS
    if tail != "renormalize" or not reference.is_infinite_without_mass(DIVERGENCES[name].definition)
]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_listed_tokens(ranks: Ranks, size: int, backend: str) -> None:
    """Of logits: ids of every slice, with some that list none of a slice's tokens, padding, and a row of nothing."""
    cases = []
    for name, tail in LISTED:
        for reduction, temperature in (("sum", 1.0), ("none", 2.0)):
            student, teacher = torch.randn(4, 40), 3.0 * torch.randn(4, 40)
            teacher[0, 10:] -= 20.0
            teacher = fastkd.top_k(teacher, 5, tail=tail, temperature=temperature)
            teacher.ids[1, 3:] = -1
            teacher.ids[3] = -1
            keywords = {
                "hard_weight": 0.5, "backend": backend, "temperature": temperature, "reduction": reduction,
                "inplace_backward": reduction == "sum",
            }  # fmt: skip
            cases.append((name, student, teacher, torch.tensor([3, 39, 11, 20]), keywords))
    check_listed(ranks, size, cases, agree)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_listed_tokens_near_convergence(ranks: Ranks, backend: str) -> None:
    """And far from 0; of some columns and of all, where nothing is left."""
    cases = []
    for name, tail in LISTED:
        for noise, offset, k in ((1e-2, 0.0, 7), (1e-3, 0.0, 40), (0.5, 1000.0, 7)):
            student = torch.randn(4, 40) + offset
            teacher = fastkd.top_k(student + noise * torch.randn(4, 40), k, tail=tail, temperature=2.0)
            keywords = {"backend": backend, "temperature": 2.0, "reduction": "none"}
            cases.append((name, student, teacher, None, keywords))
    check_listed(ranks, 4, cases, no_worse_than_whole)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_listed_tokens_over_minus_inf(ranks: Ranks, backend: str) -> None:
    """Of the student: some columns, a slice of which nothing is listed, all of a slice; of both, a listed one."""
    cases = []
    for name, tail in LISTED:
        student, teacher = torch.randn(4, 40), 3.0 * torch.randn(4, 40)
        teacher[0, :10] = -torch.inf
        teacher[1, 4:] = -torch.inf  # fewer tokens than are listed
        teacher = fastkd.top_k(teacher, 5, tail=tail)
        student[0, :10] = student[1, teacher.ids[1, 4]] = student[2, ::2] = -torch.inf
        student[2, teacher.ids[2]] = 1.0
        for reduction in ("none", "sum"):
            keywords = {"backend": backend, "reduction": reduction, "hard_weight": 0.5}
            cases.append((name, student, teacher, teacher.ids[:, 0].clone(), keywords))
    check_listed(ranks, 4, cases, agree)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_listed_tokens_far_below_the_others(ranks: Ranks, backend: str) -> None:
    """Who are no outcome of a divergence within the listed ones, whose probabilities among all float32 has not."""
    cases = []
    for name in DIVERGENCES:
        student = torch.randn(4, 40)
        teacher = fastkd.top_k(3.0 * torch.randn(4, 40), 5, tail="support")
        student.scatter_add_(1, teacher.ids, torch.full((4, 5), -200.0))
        cases.append((name, student, teacher, None, {"backend": backend, "reduction": "none"}))
    check_listed(ranks, 4, cases, no_worse_than_whole)


def test_listed_tokens_with_triton(ranks: Ranks) -> None:
    cases = []
    for name, tail in (("forward_kl", "bucket"), ("jsd(0.5)", "support")):
        teacher = fastkd.top_k(3.0 * torch.randn(2, 40), 5, tail=tail)
        keywords = {"backend": "triton", "hard_weight": 0.5}
        cases.append((name, torch.randn(2, 40), teacher, torch.tensor([3, 39]), keywords))
    check_listed(ranks, 2, cases, agree)


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


def test_a_sparse_teacher_and_no_row_that_counts(ranks: Ranks) -> None:
    keywords = {"hard_weight": 0.5, "backend": "torch"}
    case = product(torch.float32), fastkd.top_k(torch.randn(ROWS, COLUMNS), 7), torch.full((ROWS,), -100), keywords
    for ((loss, grads),) in ranks.run(linear_loss, [case], size=2):
        assert loss == 0 and not any(grad.any() for grad in grads)


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
