"""A vocabulary in slices over 1 to 4 ranks: losses and gradients are those of the whole, in every regime.

The losses are the same on every rank, bit for bit; the gradients put together are judged by the definitions in float64,
with the tolerances of a vocabulary that is whole.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd import _dispatch
from tests.assertions import check_gradient, check_loss, expect, same_bits
from tests.backends.test_minus_inf import PATTERNS, masked
from tests.backends.test_precision import REGIMES
from tests.cases import DIVERGENCES, DTYPES, STRUCTURES, inputs
from tests.distributed.programs import sliced_loss
from tests.distributed.ranks import Ranks

SIZES = (1, 2, 3, 4)
COLUMNS = 600  # which all of them divide
BOTH = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7}


@pytest.fixture(params=["torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if why := _dispatch.refusal(torch.zeros(1, 1), name, None, "slice_sums"):
        pytest.skip(why)
    return name


def check(
    ranks: Ranks, size: int, backend: str, cases: list[tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]]
) -> None:
    """``divergence`` is a name of ``cases.DIVERGENCES``."""
    calls = []
    for student, teacher, labels, keywords in cases:
        argument = DIVERGENCES[keywords.get("divergence", "forward_kl")].argument
        calls.append((student, teacher, labels, keywords | {"divergence": argument, "backend": backend}))
    results = ranks.run(sliced_loss, calls, size=size)
    for (student, teacher, labels, keywords), *of_ranks in zip(cases, *results, strict=True):
        losses, grads = zip(*of_ranks, strict=True)
        assert all(same_bits(loss, losses[0]) for loss in losses), f"{keywords}: {losses}"
        exact = {key: value for key, value in keywords.items() if key != "inplace_backward"}
        loss, grad = expect(student, teacher, labels, **exact)
        assert grads[0].dtype == student.dtype
        try:
            check_loss(losses[0], loss)
            check_gradient(torch.cat(grads, -1), grad)
        except AssertionError as error:
            raise AssertionError(f"{keywords}: {error}") from error


@pytest.mark.parametrize("size", SIZES)
def test_every_divergence_in_every_regime(ranks: Ranks, size: int, backend: str) -> None:
    """Far apart and near convergence, with a loss from one pass and one per row."""
    cases = []
    for name in DIVERGENCES:
        for regime, make in REGIMES.items():
            if regime == "noise 0.0001" and name != "cross_entropy":
                continue  # the definitions have no more digits in float64 themselves
            student, teacher = make(COLUMNS)
            for reduction in ("none", "sum"):
                cases.append((student, teacher, None, {"divergence": name, "reduction": reduction}))
    check(ranks, size, backend, cases)


@pytest.mark.parametrize("size", SIZES)
def test_every_argument(ranks: Ranks, size: int, backend: str) -> None:
    """Labels, smoothing, padding behind the vocabulary, z-loss, masks, weights, reductions, divisors, factors."""
    cases = []
    for name in STRUCTURES:
        student, teacher, labels = inputs((2, 5), COLUMNS)
        labels %= 400
        labels[0, 2] = -100
        mask = torch.rand(2, 5) > 0.3
        of_rows = {"mask": mask, "token_weights": torch.rand(2, 5)}
        for keywords in (
            BOTH,
            BOTH | {"vocab_size": 400, "label_smoothing": 0.1},
            BOTH | {"label_smoothing": 0.1, "z_loss_weight": 0.01, "reduction": "none"},
            BOTH | {"inplace_backward": True},
            BOTH | {"inplace_backward": True, "reduction": "none", "grad_output": torch.randn(2, 5)},
            BOTH | of_rows | {"temperature": 1.7, "num_items": 7, "grad_output": torch.tensor(2.5)},
            BOTH | of_rows | {"soft_mask": torch.rand(2, 5) > 0.5, "reduction": "sum", "z_loss_weight": 0.01},
            {"hard_weight": 1.0, "soft_weight": 0.0, "reduction": "none", "grad_output": torch.randn(2, 5)},
        ):
            cases.append((student, teacher, labels, keywords | {"divergence": name}))
        cases.append((student, teacher, None, {"divergence": name, "z_loss_weight": 0.1, "vocab_size": 100}))
    check(ranks, size, backend, cases)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(ranks: Ranks, size: int, dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.float64 and backend == "cpu":
        pytest.skip("its kernels compute in float32")
    cases = []
    for name in STRUCTURES:
        for reduction in ("mean", "none"):
            keywords = BOTH | {"divergence": name, "reduction": reduction, "label_smoothing": 0.1}
            cases.append((*inputs((6,), COLUMNS, dtype), keywords))
    check(ranks, size, backend, cases)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_minus_inf(ranks: Ranks, size: int, backend: str) -> None:
    """Slices without a finite logit of the student, of the teacher or of both among them; the label's as well."""
    cases = []
    for name in DIVERGENCES:
        for pattern in PATTERNS:
            cases.append((*masked(pattern, 120, "cpu"), BOTH | {"divergence": name, "reduction": "none"}))
        student, teacher, labels = inputs((4,), 120)
        student[0, :60] = -torch.inf
        teacher[1, 40:] = -torch.inf
        student[2, 30:] = teacher[2, 30:] = -torch.inf
        student[3, :40] = -torch.inf
        labels[:] = torch.tensor([80, 10, 20, 3])
        for reduction in ("none", "sum"):
            keywords = BOTH | {"divergence": name, "reduction": reduction}
            cases.append((student, teacher, labels, keywords))
            cases.append((student, teacher, labels, keywords | {"label_smoothing": 0.1}))
    check(ranks, size, backend, cases)


@pytest.mark.parametrize("size", [2, 4])
def test_labels_of_confident_rows(ranks: Ranks, size: int, backend: str) -> None:
    """1 − p_y and −log p_y keep their digits as p_y → 1, the others being in other slices or in the same."""
    gaps = torch.tensor([5.0, 10.0, 20.0, 40.0])
    student, _, labels = inputs((len(gaps),), COLUMNS, spread=1.0)
    student[torch.arange(len(gaps)), labels] = student.amax(-1) + gaps
    keywords = {"hard_weight": 1.0, "soft_weight": 0.0, "reduction": "none", "backend": backend}
    results = ranks.run(sliced_loss, [(student, student, labels, keywords)], size=size)
    leaf = student.double().requires_grad_()
    others = (leaf - leaf.gather(1, labels.unsqueeze(1))).exp().scatter(1, labels.unsqueeze(1), 0.0).sum(-1)
    expected = others.log1p()
    (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
    grad = torch.cat([of_rank[0][1] for of_rank in results], -1)
    torch.testing.assert_close(results[0][0][0].double(), expected.detach(), rtol=1e-5, atol=1e-37)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("size", [2, 4])
def test_more_rows_than_fit_in_the_first_message(ranks: Ranks, size: int) -> None:
    check(ranks, size, "torch", [(*inputs((1000,), 12), BOTH | {"divergence": name}) for name in STRUCTURES])


def test_slices_without_tokens(ranks: Ranks) -> None:
    """The last ranks have padding alone; and there may be no rows."""
    keywords = BOTH | {"vocab_size": 3, "label_smoothing": 0.1}
    student, teacher, labels = inputs((5,), 8)
    cases = [(student, teacher, labels % 3, keywords | {"divergence": name}) for name in STRUCTURES]
    cases.append((*inputs((0,), 8), BOTH))
    check(ranks, 4, "torch", cases)


def test_triton(ranks: Ranks) -> None:
    """In its interpreter, or on a GPU's rank of one."""
    if why := _dispatch.refusal(torch.zeros(1, 1), "triton", None, "slice_sums"):
        pytest.skip(why)
    keywords = BOTH | {"label_smoothing": 0.1, "vocab_size": 50}
    student, teacher, labels = inputs((2,), 60)
    labels %= 50
    cases = [(student, teacher, labels, keywords | {"divergence": name}) for name in STRUCTURES]
    cases.append((student, student + 1e-3 * teacher, labels, keywords | {"reduction": "none"}))
    check(ranks, 2, "triton", cases)
