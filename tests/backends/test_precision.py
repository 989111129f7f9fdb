"""Every backend where float32 has few digits to spare: near convergence, confident rows, logits far from 0.

Per row, against the definitions in float64 on the same values.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastkd
from tests import reference
from tests.assertions import check_call, check_gradient, check_loss, expect, run
from tests.cases import DIVERGENCES, STRUCTURES, inputs

# The cross-entropy contains the teacher's entropy: it is not small near convergence.
NEAR_0 = tuple(name for name in DIVERGENCES if name != "cross_entropy")
LLAMA2 = 32000


def student_and_teacher(spread: float, noise: float, device: str, columns: int = LLAMA2) -> tuple[Tensor, Tensor]:
    """Logits of this spread, and the teacher's, which differ by the noise."""
    student = torch.randn(1, columns) * spread
    return student.to(device), (student + noise * torch.randn(1, columns)).to(device)


def check_divergence(name: str, backend: str, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> None:
    """The soft term within 1e-3 and not negative, from the loss alone and from the pass that gives a gradient."""
    argument, definition = DIVERGENCES[name]
    log_t, log_s = (torch.log_softmax(x.double() / temperature, -1) for x in (teacher, student))
    expected = definition(log_t, log_s).item()
    for leaf in (student, student.clone().requires_grad_()):
        loss = fastkd.kd_loss(
            leaf, teacher, divergence=argument, temperature=temperature, scale_soft_by_t2=False, backend=backend
        )
        assert loss.item() >= 0.0
        assert loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "tvd", "jsd(0.5)"])
def test_near_convergence(backend: str, device: str, name: str) -> None:
    """A divergence of some 5e-7, the sum of 32000 terms. Plain float32 would be wrong by more than its value."""
    check_divergence(name, backend, *student_and_teacher(1.0, 1e-3, device))


@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["flat", "peaky"])
@pytest.mark.parametrize("name", NEAR_0)
def test_near_convergence_of_every_divergence(backend: str, device: str, name: str, spread: float) -> None:
    check_divergence(name, backend, *student_and_teacher(spread, 1e-3, device, columns=4000))


@pytest.mark.parametrize("temperature", [2.0, 1.7])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd(0.5)"])
def test_near_convergence_at_a_temperature(backend: str, device: str, name: str, temperature: float) -> None:
    check_divergence(name, backend, *student_and_teacher(3.0, 1e-3, device, columns=4000), temperature)


@pytest.mark.parametrize("noise", [0.03, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("name", NEAR_0)
def test_on_the_way(backend: str, device: str, name: str, noise: float) -> None:
    """Between the formula for small divergences and the one for large."""
    student, teacher = student_and_teacher(3.0, noise, device, columns=1500)
    check_call(student, teacher, backend=backend, divergence=name, reduction="none")


@pytest.mark.parametrize("name", NEAR_0)
@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_equal(backend: str, device: str, spread: float, name: str) -> None:
    """Never negative, and 0 but for rounding; so is the gradient."""
    student, teacher = student_and_teacher(spread, 0.0, device, columns=4000)
    for reduction in ("mean", "none"):
        arguments = {"divergence": DIVERGENCES[name].argument, "reduction": reduction}
        loss, grad = run(student, teacher, None, backend=backend, temperature=2.0, **arguments)
        assert 0.0 <= loss.item() < 1e-9
        assert grad.norm() < 1e-6


def test_equal_and_shifted(backend: str, device: str) -> None:
    """Logits that differ by a constant are the same distribution."""
    student, _ = student_and_teacher(3.0, 0.0, device, columns=4000)
    student = student.round(decimals=2)
    for name in NEAR_0:
        loss, _ = run(student, student + 4.0, None, backend=backend, divergence=DIVERGENCES[name].argument)
        assert 0.0 <= loss.item() < 1e-6


@pytest.mark.parametrize("temperature", [None, 1.0, 2.0, 4.0, 1.7])
def test_confident_rows(backend: str, device: str, temperature: float | None) -> None:
    """As p_y → 1 both the loss −log p_y and the gradient p_y − 1 keep their digits, down to 1e-30.

    With a temperature, beside a soft term that is 0, which shares exponentials with the hard one.
    """
    gaps = torch.tensor([5.0, 10.0, 20.0, 40.0, 70.0])
    student, _, labels = inputs((len(gaps),), 500, spread=1.0)
    student[torch.arange(len(gaps)), labels] = student.amax(-1) + gaps
    student, labels = student.to(device), labels.to(device)
    weights = {"soft_weight": 0.0} if temperature is None else {"temperature": temperature}
    loss, grad = run(student, student, labels, hard_weight=1.0, reduction="none", backend=backend, **weights)

    leaf = student.double().requires_grad_()
    # Not through log p_y, which has no digits left in float64 either: the loss is log(1 + Σ of the others' ratios).
    others = (leaf - leaf.gather(1, labels.unsqueeze(1))).exp().scatter(1, labels.unsqueeze(1), 0.0).sum(-1)
    expected = others.log1p()
    (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-37)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("gap", [100.0, 1e4])
def test_certain_row(backend: str, device: str, gap: float) -> None:
    """Beyond float32's range p_y is 1: the loss and the gradient are 0, and 1 − p_y is 1 for any other label."""
    student, teacher, labels = inputs((2,), 500, spread=1.0, device=device)
    student[:, 7] = student.amax() + gap
    labels[0], labels[1] = 7, 8
    loss, grad = run(student, teacher, labels, hard_weight=1.0, soft_weight=0.0, reduction="none", backend=backend)
    assert 0.0 <= loss[0] < 1e-37
    assert (grad[0].abs() < 1e-37).all()
    assert loss[1].item() == pytest.approx((student[1, 7] - student[1, 8]).item(), rel=1e-6)
    assert grad[1, [7, 8]].tolist() == pytest.approx([1.0, -1.0], rel=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_large_logits(backend: str, device: str, name: str) -> None:
    """±1e4: exponentials overflow without their maximum, and differences of log-probabilities are in the thousands."""
    given = inputs((2,), 127, device=device)
    student, teacher = (x.sign() * 1e4 * torch.rand_like(x) for x in given[:2])
    check_call(student, teacher, given.labels, backend=backend, divergence=name, hard_weight=0.5, reduction="none")


@pytest.mark.parametrize("centre", [100.0, -1e3, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("name", STRUCTURES)
def test_logits_far_from_0(backend: str, device: str, name: str, temperature: float, centre: float) -> None:
    """Softmax does not see a common offset, nor may the rounding of its exponents."""
    student, teacher, labels = inputs((2,), 500, device=device)
    for reduction in ("mean", "none"):
        check_call(
            student + centre, teacher + centre, labels, backend=backend, divergence=name, reduction=reduction,
            temperature=temperature, hard_weight=0.5, label_smoothing=0.1,
        )  # fmt: skip


def disjoint(columns: int) -> tuple[Tensor, Tensor]:
    """Each gives the other's tokens e⁻¹⁶ of what it gives its own, at T = 1/2."""
    lift = torch.where(torch.arange(columns) < columns // 2, 4.0, -4.0).cpu()
    return torch.randn(4, columns, device="cpu") + lift, torch.randn(4, columns, device="cpu") - lift


def beside(columns: int, noise: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """The offset is the teacher's, a negative one the student's."""
    student = 3.0 * torch.randn(4, columns, device="cpu")
    teacher = student + noise * torch.randn(4, columns, device="cpu")
    return student + min(offset, 0.0), teacher + max(offset, 0.0)


REGIMES = {
    **{
        f"randn x {spread}": lambda n, spread=spread: tuple(spread * torch.randn(2, 4, n, device="cpu"))
        for spread in (0.1, 1.0, 4.0, 8.0)
    },
    **{f"noise {noise}": lambda n, noise=noise: beside(n, noise) for noise in (1e-1, 1e-2, 1e-3, 1e-4)},
    "disjoint": disjoint,
    **{
        f"offset {offset}": lambda n, offset=offset: beside(n, 0.5, offset)
        for offset in (10.0, 100.0, 1e3, 1e4, -100.0, -1e3, -1e4)
    },
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("regime", REGIMES)
def test_digits_in_every_regime(backend: str, device: str, regime: str, name: str) -> None:
    """Loss and gradient to 1e-5 in norm, without a floor: from one pass, and from statistics."""
    for temperature in (0.5, 2.0):
        student, teacher = (x.to(device) for x in REGIMES[regime](600))
        exact, exact_grad = expect(student, teacher, None, divergence=name, temperature=temperature, reduction="none")
        for reduction in ("none", "sum"):
            loss, grad = run(
                student, teacher, None, backend=backend, divergence=DIVERGENCES[name].argument,
                temperature=temperature, reduction=reduction,
            )  # fmt: skip
            expected = exact if reduction == "none" else exact.sum()
            # At noise 1e-4 the definitions have no more digits in float64 themselves.
            assert (loss - expected).norm() <= (1e-3 if regime == "noise 0.0001" else 1e-5) * expected.norm()
            assert (grad - exact_grad).norm() <= 1e-5 * exact_grad.norm()


@pytest.mark.parametrize("offset", [100.0, 1e3, 1e4, -100.0, -1e3, -1e4])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd(0.5)", "skew_kl(0.1)", "skew_reverse_kl(0.1)"])
def test_one_side_at_an_offset(backend: str, device: str, name: str, offset: float) -> None:
    """Every row, where the rounding of u − z is of the offset's size: no worse than twice float32's definitions."""
    student = 2.0 * torch.randn(16, 1000, device=device)
    teacher = student + 0.5 * torch.randn(16, 1000, device=device) + max(offset, 0.0)
    student += min(offset, 0.0)
    argument, definition = DIVERGENCES[name]
    exact, exact_grad = expect(student, teacher, None, divergence=name, reduction="none")
    leaf = student.clone().requires_grad_()
    plain = definition(teacher.log_softmax(-1), leaf.log_softmax(-1))
    (plain_grad,) = torch.autograd.grad(plain.sum(), leaf)
    for reduction in ("none", "sum"):
        loss, grad = run(student, teacher, None, backend=backend, divergence=argument, reduction=reduction)
        worst = ((grad - exact_grad).norm(dim=-1) / exact_grad.norm(dim=-1)).max()
        assert worst <= max(1e-5, 2.0 * ((plain_grad - exact_grad).norm(dim=-1) / exact_grad.norm(dim=-1)).max())
    loss, _ = run(student, teacher, None, backend=backend, divergence=argument, reduction="none")
    assert ((loss - exact) / exact).abs().max() <= max(1e-5, 2.0 * ((plain - exact) / exact).abs().max())


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name not in ("forward_kl", "cross_entropy")])
def test_little_mass_where_the_student_is_masked(backend: str, device: str, name: str) -> None:
    """A divergence that is small though one token has mass on one side alone (of the others, infinite)."""
    student, teacher = (x.to(device) for x in beside(600, 1e-3))
    student[:, 7] = -torch.inf
    teacher[:, 7] = teacher[:, 8:].logsumexp(-1) - 6.0
    for reduction in ("none", "sum"):
        check_call(student, teacher, backend=backend, divergence=name, reduction=reduction)


@pytest.mark.parametrize("below", ["student", "teacher"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_little_mass_where_the_other_is_far_below(backend: str, device: str, name: str, below: str) -> None:
    """A divergence that is small though |log p_t − log p_s| is in the hundreds at a token: it counts in full."""
    gaps = torch.tensor([100.0, 149.0, 1e3, 1e4], device=device)
    student, teacher = (x.to(device) for x in beside(600, 1e-3))
    low, high = (student, teacher) if below == "student" else (teacher, student)
    low[:, 7] = low.amax(-1) - gaps
    high[:, 7] = high[:, 8:].logsumexp(-1) - 3.6 - gaps.log()
    for reduction in ("none", "sum"):
        check_call(student, teacher, backend=backend, divergence=name, reduction=reduction)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["forward_kl", "cross_entropy"])
def test_one_sided_finfo_min(backend: str, device: str, name: str, temperature: float) -> None:
    """A student masked by the smallest float32 where the teacher has mass: huge, and not infinite."""
    student, teacher, _ = inputs((2,), 300, device=device)
    student[0, 5] = torch.finfo(torch.float32).min
    teacher[0, 5] = teacher[0].logsumexp(-1) - 0.5
    student[1, [3, 40, 270]] = torch.finfo(torch.float32).min
    teacher[1, [3, 40, 270]] = teacher[1].logsumexp(-1) - 1.5
    exact, exact_grad = expect(student, teacher, None, divergence=name, temperature=temperature, reduction="none")
    exact /= temperature**2  # T² times it is beyond float32
    assert (exact > 2e37).all()
    loss, grad = run(
        student, teacher, None, backend=backend, divergence=name, temperature=temperature, reduction="none",
        scale_soft_by_t2=False,
    )  # fmt: skip
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0.0)
    assert (grad - exact_grad / temperature**2).norm() <= 1e-5 * exact_grad.norm() / temperature**2


def test_weight_that_overflows_where_there_is_no_mass(backend: str, device: str) -> None:
    """3·log(p_t/p_s) is beyond float32 where the student is masked by its smallest number; p_s is 0 there."""
    student, teacher, _ = inputs((2,), 300, device=device)
    student[:, 5] = torch.finfo(torch.float32).min
    exact, exact_grad = expect(student, teacher, None, divergence="reverse_kl", reduction="none")
    triple = fastkd.Divergence("triple", c_t=0.0, c_s=3.0, w=1.0)
    for reduction in ("none", "sum"):
        loss, grad = run(student, teacher, None, backend=backend, divergence=triple, reduction=reduction)
        check_loss(loss, 3.0 * (exact if reduction == "none" else exact.sum()))
        check_gradient(grad, 3.0 * exact_grad)


def test_confident_row_in_float64(device: str) -> None:
    """softplus has its digits beyond 20."""
    logits = torch.tensor([[0.0, 20.1]], dtype=torch.float64, device=device)
    loss, _ = run(logits, logits, torch.tensor([0], device=device), hard_weight=1.0, soft_weight=0.0, backend="torch")
    assert loss.item() == pytest.approx(20.10000000186501, rel=1e-14)


def test_reference_of_the_divergences() -> None:
    """The definitions in float64 keep enough digits near convergence to judge by: exact for two tokens, by series."""
    gap = 1e-3
    log_t, log_s = torch.log_softmax(torch.tensor([[0.0, gap], [0.0, 0.0]], dtype=torch.float64), -1).unsqueeze(1)
    for definition in (reference.forward_kl, reference.reverse_kl):
        assert definition(log_t, log_s).item() == pytest.approx(gap**2 / 8, rel=1e-6)
    assert reference.jsd(0.5)(log_t, log_s).item() == pytest.approx(gap**2 / 32, rel=1e-6)
    assert reference.tvd(log_t, log_s).item() == pytest.approx(gap / 4, rel=1e-6)
