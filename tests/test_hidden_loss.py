"""The module over pairs of layers: its mean, its projections, what it keeps."""

from __future__ import annotations

import copy
import pickle
import re
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd

PAIRS = fastkd.layer_map(2, 4)  # (1, 2), (2, 4)
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()


def states(student_size: int = 4, teacher_size: int = 4) -> tuple[list[Tensor], list[Tensor]]:
    return (
        [torch.randn(2, 3, student_size, requires_grad=True) for _ in range(3)],
        [torch.randn(2, 3, teacher_size) for _ in range(5)],
    )


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0]], ids=["even", "weighted"])
@pytest.mark.parametrize("size", [4, 6])
def test_the_weighted_mean(kind: str, weights: list[float] | None, size: int) -> None:
    """And its gradients, to states and projections."""
    student, teacher = states(teacher_size=size)
    module = fastkd.HiddenLoss(PAIRS, 4, size, kind=kind, weights=weights)
    a, b = (0.5, 0.5) if weights is None else (0.25, 0.75)
    projected = [module.projections[i - 1](student[i]) for i in (1, 2)] if size == 6 else student[1:]
    expected = a * fastkd.hidden_loss(projected[0], teacher[2], kind=kind, mask=MASK) + b * fastkd.hidden_loss(
        projected[1], teacher[4], kind=kind, mask=MASK
    )
    loss, pairs = module(student, teacher, mask=MASK, return_parts=True)
    assert not pairs.requires_grad
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(a * pairs[0] + b * pairs[1], expected.detach())
    torch.testing.assert_close(pairs[0], fastkd.hidden_loss(projected[0], teacher[2], kind=kind, mask=MASK).detach())
    assert torch.equal(module(tuple(student), tuple(teacher), mask=MASK), loss)
    inputs = [*student[1:], *module.parameters()]
    assert len(inputs) == (2 if size == 4 else 6)
    for one, other in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_by_hand() -> None:
    """With masked states, a projection and F.mse_loss."""
    student, teacher = states(teacher_size=6)
    module = fastkd.HiddenLoss(PAIRS, 4, 6)
    expected = sum(
        0.5 * F.mse_loss(projection(student[i])[MASK], teacher[j][MASK])
        for (i, j), projection in zip(PAIRS, module.projections, strict=True)
    )
    torch.testing.assert_close(module(student, teacher, mask=MASK), expected)


def test_float64() -> None:
    """Weights that float32 has not are not rounded to it."""
    student, teacher = ([state.double() for state in of_model] for of_model in states())
    loss, pairs = fastkd.HiddenLoss(PAIRS, 4, 4, weights=[1.0, 2.0])(student, teacher, return_parts=True)
    expected = torch.stack([F.mse_loss(student[i], teacher[j]) for i, j in PAIRS])
    torch.testing.assert_close(pairs, expected.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(loss, (expected[0] + 2 * expected[1]) / 3, rtol=1e-14, atol=0)


def test_rows_weights_and_items() -> None:
    student, teacher = states()
    weights, module = torch.rand(2, 3), fastkd.HiddenLoss([(1, 1)], 4, 4)
    torch.testing.assert_close(
        module(student, teacher, mask=MASK, token_weights=weights, num_items=7),
        fastkd.hidden_loss(student[1], teacher[1], mask=MASK, token_weights=weights, num_items=7),
    )


def test_the_gradient_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over pairs is in it from the start: a loss of its own scales nothing in backward."""
    scaled: list[Any] = []
    monkeypatch.setattr(fastkd._autograd._op, "scale_", lambda *arguments: scaled.append(arguments))
    student, teacher = states()
    fastkd.HiddenLoss(PAIRS, 4, 4)(student, teacher).backward()
    assert not scaled
    (2.0 * fastkd.HiddenLoss(PAIRS, 4, 4)(student, teacher)).backward()
    assert len(scaled) == 2


def test_projected_states_are_not_kept() -> None:
    """Backward needs the gradient of them alone."""
    student, teacher = states(teacher_size=6)
    module = fastkd.HiddenLoss(PAIRS, 4, 6)
    projected: list[Any] = []
    for projection in module.projections:
        projection.register_forward_hook(lambda module, inputs, output: projected.append(weakref.ref(output)))
    loss = module(student, teacher, mask=MASK)
    assert len(projected) == 2 and not any(reference() is not None for reference in projected)
    loss.backward()
    assert student[1].grad.any() and module.projections[1].weight.grad.any()


def test_widths_that_agree_need_no_projection() -> None:
    for projection in ("linear", None):
        assert not list(fastkd.HiddenLoss(PAIRS, 4, 4, projection=projection).parameters())
    assert len(list(fastkd.HiddenLoss(PAIRS, 4, 6).parameters())) == 4


def test_trains_with_the_student() -> None:
    """Student and projections in one optimizer, as the documentation has it, bring the loss down."""
    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(3, 4), torch.nn.Linear(3, 6)
    loss_fn = fastkd.HiddenLoss([(0, 0)], 4, 6)
    optimizer = torch.optim.AdamW([*student.parameters(), *loss_fn.parameters()], lr=0.1)
    x, losses = torch.randn(8, 3), []
    for _ in range(50):
        loss = loss_fn([student(x)], [teacher(x)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


def test_is_a_module() -> None:
    """Copied, pickled, printed, saved and moved to another dtype."""
    module = fastkd.HiddenLoss(PAIRS, 4, 6, kind="cosine", weights=[1.0, 3.0])
    student, teacher = states(teacher_size=6)
    expected = module(student, teacher)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(student, teacher), expected)
    fresh = fastkd.HiddenLoss(PAIRS, 4, 6, kind="cosine", weights=[1.0, 3.0])
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(student, teacher), expected)
    half = module.to(torch.bfloat16)([s.bfloat16() for s in student], teacher)
    torch.testing.assert_close(half, expected, rtol=0.02, atol=0)
    assert "pairs=[(1, 2), (2, 4)], kind='cosine', weights=[0.25, 0.75]" in repr(module)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"pairs": [(1, 2, 3)]}, TypeError, "pairs: got (1, 2, 3), must be pairs of ints"),
        ({"pairs": []}, ValueError, "pairs: got no pair"),
        ({"student_size": 0}, ValueError, "student_size: got 0, must be >= 1"),
        ({"teacher_size": 4.0}, TypeError, "teacher_size: got float, must be an int"),
        ({"kind": "l2"}, ValueError, "kind: got 'l2', must be one of 'mse', 'cosine'"),
        ({"weights": [1.0]}, ValueError, "weights: got 1, must be one a pair, 2"),
        ({"weights": [1.0, 0.0]}, ValueError, "weights: got 0.0, must be > 0; leave the pair out"),
        ({"weights": [1.0, "a"]}, TypeError, "weights: got str, must be a number"),
        ({"weights": 2.0}, TypeError, "weights: got float, must be a sequence of numbers"),
        ({"projection": "mlp"}, ValueError, "projection: got 'mlp', must be 'linear' or None"),
        ({"projection": None}, ValueError, "projection: got None, must be 'linear' where student_size, 4, is not teac"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_bad_argument(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(message)):
        fastkd.HiddenLoss(**{"pairs": PAIRS, "student_size": 4, "teacher_size": 6} | arguments)


def test_bad_states() -> None:
    student, teacher = states()
    module = fastkd.HiddenLoss(PAIRS, 4, 4)
    with pytest.raises(ValueError, match=r"^teacher_hidden_states: got 4 tensors, must be more than 4, an index of p"):
        module(student, teacher[:4])
    with pytest.raises(ValueError, match=r"^student_hidden_states\[1\]: got a width of 3, must be student_size, 4"):
        module([tensor[..., :3] for tensor in student], teacher)
    with pytest.raises(TypeError, match=r"^student_hidden_states: got NoneType, must be .* output_hidden_states=True"):
        module(None, teacher)
    with pytest.raises(TypeError, match=r"^teacher_hidden_states\[2\]: got NoneType, must be a tensor"):
        module(student, [None] * 5)
    with pytest.raises(
        ValueError, match=r"^token_weights: got shape \(3,\), must be \(2, 3\), one entry a row of stude"
    ):
        module(student, teacher, token_weights=torch.ones(3))
    with pytest.raises(TypeError, match=r"^mask: got torch\.int64, must be torch\.bool"):
        module(student, teacher, mask=MASK.long())
