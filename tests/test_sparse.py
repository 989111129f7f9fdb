"""Teachers who list a few tokens: how they are made, what surrounds the loss, properties, and bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import LinearLogits, TopK, _labels, _linear
from tests.cases import without_last

BOTH = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7}
DIVERGENCES = [
    "forward_kl", "reverse_kl", "tvd", fastkd.JSD(0.5), fastkd.SkewKL(0.1), fastkd.SkewReverseKL(0.1),
    fastkd.SymmetricKL(0.3),
]  # fmt: skip


def top_k_of(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    values, ids = torch.log_softmax(logits.double() / temperature, -1).topk(k)
    return ids, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_top_k(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the whole vocabulary, at T, whatever the chunks; and far from 0."""
    monkeypatch.setattr(_linear, "CHUNK_BYTES_CPU", 4096)
    monkeypatch.setattr(_linear, "CHUNK_BYTES_OTHER", 4096)
    logits = (3.0 * torch.randn(3, 5, 300, device=device)).to(dtype).requires_grad_()
    for whole, shift in ((logits, 0.0), (without_last(logits.detach()), 0.0), (logits.detach() + 1e3, 1e3)):
        teacher = fastkd.top_k(whole, 7, temperature=2.0, tail="support")
        ids, values = top_k_of(whole, 7, 2.0)
        assert teacher.ids.dtype == torch.int64 and teacher[2:] == (2.0, "support")
        assert teacher.log_probs.dtype == torch.promote_types(dtype, torch.float32)
        assert not teacher.log_probs.requires_grad
        # bfloat16 logits tie.
        torch.testing.assert_close(whole.gather(-1, teacher.ids), whole.gather(-1, ids), rtol=0, atol=0)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(teacher.log_probs.double(), values, rtol=tolerance, atol=tolerance)
        assert shift == 0.0 or whole.min() > 900


def test_top_k_of_hidden_states(device: str, monkeypatch: pytest.MonkeyPatch, multiplied: list[torch.Size]) -> None:
    """Of which no more than a chunk of logits is ever there."""
    monkeypatch.setattr(_linear, "CHUNK_BYTES_CPU", 4 * 301 * 4)
    monkeypatch.setattr(_linear, "CHUNK_BYTES_OTHER", 4 * 301 * 4)
    source = LinearLogits(torch.randn(2, 7, 16, device=device), torch.randn(301, 16, device=device), softcap=8.0)
    logits = 8.0 * torch.tanh(source.hidden.double() @ source.weight.double().T / 8.0)
    teacher = fastkd.top_k(source, 5, temperature=1.5)
    ids, values = top_k_of(logits, 5, 1.5)
    assert torch.equal(teacher.ids, ids)
    torch.testing.assert_close(teacher.log_probs.double(), values, rtol=1e-5, atol=1e-5)
    assert len(multiplied) == 4 and max(shape[0] for shape in multiplied) == 4
    assert fastkd.sample_tokens(source, 5).ids.shape == (2, 7, 5)


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_no_rows_and_one(device: str, shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, 11, device=device)
    assert fastkd.top_k(logits, 3).ids.shape == (*shape, 3)
    assert fastkd.sample_tokens(logits, 3).log_probs.shape == (*shape, 3)
    leaf = logits.clone().requires_grad_()
    loss = fastkd.kd_loss(leaf, fastkd.top_k(logits, 3))
    loss.backward()
    assert leaf.grad is not None and leaf.grad.shape == logits.shape
    assert abs(loss.item()) < 1e-6


def test_samples(device: str) -> None:
    """Distinct ids, shares of n, padding behind them; the same from the same generator."""
    logits = torch.randn(4, 30, device=device) * 2
    first, second = (
        fastkd.sample_tokens(logits, 16, temperature=2.0, generator=torch.Generator(device).manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(first.ids, second.ids) and torch.equal(first.log_probs, second.log_probs)
    assert first.temperature == 2.0 and first.tail == "renormalize"
    for ids, log_probs in zip(*first[:2], strict=True):
        count = int((ids >= 0).sum())
        assert (ids[count:] == -1).all() and (log_probs[count:] == -torch.inf).all()
        assert len(set(ids[:count].tolist())) == count
        shares = 16 * log_probs[:count].exp()
        torch.testing.assert_close(shares, shares.round())
        torch.testing.assert_close(shares.sum(), torch.tensor(16.0, device=device))


def test_samples_are_unbiased(device: str) -> None:
    """The mean gradient of forward KL over many draws is the dense one's; the top k's is far from it."""
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 1, 20, device=device, dtype=torch.float64)
    draws = 20000

    def gradient(of: Any, rows: int) -> Tensor:
        leaf = student.expand(rows, -1).clone().requires_grad_()
        fastkd.kd_loss(leaf, of, temperature=2.0).backward()
        return leaf.grad.sum(0)

    exact = gradient(teacher, 1)
    of_samples = gradient(fastkd.sample_tokens(teacher.expand(draws, -1), 4, temperature=2.0), draws)
    # A column's standard error is that of a share of 4·draws.
    limit = 4.0 * 2.0 * (0.25 / (4 * draws)) ** 0.5
    assert (of_samples - exact).abs().max() < limit
    biased = gradient(fastkd.top_k(teacher, 4, temperature=2.0, tail="renormalize"), 1)
    assert (biased - exact).abs().max() > 5 * limit


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 40), st.data(), st.sampled_from(DIVERGENCES), st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.1, 1.0, 6.0]),
)  # fmt: skip
def test_bucket_is_never_above_the_whole(
    columns: int, data: Any, divergence: Any, temperature: float, spread: float
) -> None:
    """Lumping outcomes together loses information: the data processing inequality."""
    k = data.draw(st.integers(1, columns))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    student, logits = torch.randn(2, 3, columns) * spread
    ids = torch.stack([torch.randperm(columns)[:k] for _ in range(3)])
    log_probs = torch.log_softmax(logits.double() / temperature, -1)
    rest = log_probs.exp().scatter(-1, ids, 0.0).sum(-1)
    assume(((rest == 0) | (rest > 2**-24)).all())  # less than the least that a bucket has
    log_probs = log_probs.gather(-1, ids)
    keys: dict[str, Any] = {"temperature": temperature, "divergence": divergence, "reduction": "none"}
    whole = fastkd.kd_loss(student.double(), logits.double(), **keys)
    bucket = fastkd.kd_loss(student.double(), TopK(ids, log_probs, temperature), **keys)
    assert (bucket >= 0).all()
    # 1 − Σp is off by the rounding of float64, of which a logarithm is taken.
    assert (bucket <= whole * (1 + 1e-9) + 1e-9).all()


def test_a_student_who_has_it_right(device: str) -> None:
    """The K and the rest's mass: 0, though the rest is not the teacher's; and the gradient there is 0."""
    teacher = torch.randn(3, 50, device=device, dtype=torch.float64)
    listed = fastkd.top_k(teacher, 5)
    student = torch.randn_like(teacher)
    mass, own = (
        torch.logsumexp(logits.scatter(-1, listed.ids, -torch.inf), -1, keepdim=True) for logits in (teacher, student)
    )
    student = (student - own + mass).scatter(-1, listed.ids, teacher.gather(-1, listed.ids))
    leaf = student.requires_grad_()
    for divergence in (d for d in DIVERGENCES if d != "tvd"):  # whose gradient is a sign
        loss = fastkd.kd_loss(leaf, listed, divergence=divergence)
        assert loss.item() < 1e-12
        assert torch.autograd.grad(loss, leaf)[0].abs().max() < 1e-6
    assert fastkd.kd_loss(leaf, teacher).item() > 1e-2


def given_rows(device: str) -> tuple[Tensor, TopK, Tensor]:
    logits = torch.randn(4, 30, device=device) * 2
    student = (torch.randn(4, 30, device=device) * 2).requires_grad_()
    return student, fastkd.top_k(logits, 4, temperature=2.0), torch.randint(0, 30, (4,), device=device)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autograd(device: str, reduction: str) -> None:
    """Backward twice, no second derivative, a grad_output of its own, none for the teacher, and a checkpoint."""
    student, teacher, labels = given_rows(device)
    teacher.log_probs.requires_grad_()
    loss = fastkd.kd_loss(student, teacher, labels, reduction=reduction, **BOTH)
    ones = torch.ones_like(loss)
    once, tripled = (torch.autograd.grad(loss, student, f * ones, retain_graph=True)[0] for f in (1.0, 3.0))
    torch.testing.assert_close(tripled, 3.0 * once)
    assert torch.autograd.grad(loss.sum(), teacher.log_probs, allow_unused=True, retain_graph=True) == (None,)
    (grad,) = torch.autograd.grad(loss.sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second-order gradient"):
        grad.square().sum().backward()

    def step(logits: Tensor) -> Tensor:
        return fastkd.kd_loss(logits * 1.0, teacher, labels, reduction=reduction, **BOTH).sum()

    again = checkpoint(step, student, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, student)[0], once)
    with torch.no_grad():
        assert not fastkd.kd_loss(student, teacher, labels, **BOTH).requires_grad


def test_autocast_and_module(device: str) -> None:
    student, teacher, labels = given_rows(device)
    expected = fastkd.kd_loss(student, teacher, labels, **BOTH)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(fastkd.kd_loss(student, teacher, labels, **BOTH), expected)
        low = fastkd.top_k(LinearLogits(student.detach(), torch.eye(30, device=device)), 4)
    torch.testing.assert_close(low.log_probs, fastkd.top_k(student.detach(), 4).log_probs, rtol=2e-2, atol=2e-2)
    assert torch.equal(fastkd.KDLoss(**BOTH)(student, teacher, labels), expected)


def listing(ids: Any = None, log_probs: Any = None, **rest: Any) -> TopK:
    good = torch.tensor([[0, 4], [7, -1], [2, 1]])
    return TopK(good if ids is None else ids, torch.full((3, 2), 0.3).log() if log_probs is None else log_probs, **rest)


BAD = [
    (r"teacher_logits.ids: got list, must be a tensor", TypeError, listing(ids=[1])),
    (r"teacher_logits.ids: got torch.int16, must be torch.int32 or", TypeError, listing(torch.zeros(3, 2).short())),
    (r"ids: got shape \(3,\), must be \(3, K\) with K >= 1", ValueError, listing(torch.zeros(3).long())),
    (r"ids: got shape \(4, 2\), must be \(3, K\)", ValueError, listing(torch.zeros(4, 2).long())),
    (r"ids: got shape \(3, 0\), must be \(3, K\) with K", ValueError, listing(torch.zeros(3, 0).long())),
    (r"log_probs: got shape \(3, 3\), must be that of ids, \(3, 2\)", ValueError, listing(None, torch.zeros(3, 3))),
    (r"log_probs: got torch.int64, must be float32", TypeError, listing(None, torch.zeros(3, 2).long())),
    (r"ids: got device meta", ValueError, listing(torch.zeros(3, 2, dtype=torch.int64, device="meta"))),
    (r"teacher_logits.tail: got 'rest', must be one of 'bucket'", ValueError, listing(tail="rest")),
    (r"temperature: got 1.0 with .* teacher at temperature 2.0", ValueError, listing(temperature=2.0)),
    (r"teacher_logits.temperature: got Tensor, must be a number", TypeError, listing(temperature=torch.ones(2))),
    (r"ids: got 11 in row 1, must be in \[0, 11\)", ValueError, listing(torch.tensor([[0, 4], [11, 1], [2, 1]]))),
    (r"ids: got -2 in row 2, must be in", ValueError, listing(torch.tensor([[0, 4], [7, -1], [2, -2]]))),
    (r"ids: got 4 more than once in row 0", ValueError, listing(torch.tensor([[4, 4], [7, -1], [2, 1]]))),
    (r"log_probs: got probabilities of sum 14.78 in row 0, must be at most 1; .* fastkd.top_k", ValueError,
     listing(None, torch.full((3, 2), 2.0))),
    (r"log_probs: got probabilities of sum nan in row 1", ValueError,
     listing(None, torch.tensor([[-1.0, -1.0], [torch.nan, 0.0], [-1.0, -1.0]]))),
]  # fmt: skip


@pytest.mark.parametrize(("message", "kind", "teacher"), BAD, ids=[message for message, _, _ in BAD])
@pytest.mark.parametrize("linear", [False, True])
def test_bad_argument(message: str, kind: type[Exception], teacher: TopK, linear: bool) -> None:
    with torch.device("cpu"):
        student = LinearLogits(torch.randn(3, 8), torch.randn(11, 8)) if linear else torch.randn(3, 11)
        with pytest.raises(kind, match=message):
            fastkd.kd_loss(student, teacher)


def test_refusals(device: str) -> None:
    student, teacher, _ = given_rows(device)
    sparse = teacher._replace(tail="renormalize")
    with pytest.raises(ValueError, match="'renormalize' with a divergence that is infinite where the teacher has no"):
        fastkd.kd_loss(student, sparse, temperature=2.0, divergence="reverse_kl")
    with pytest.raises(ValueError, match="chunk_rows: got 4 with tensors"):
        fastkd.kd_loss(student, teacher, temperature=2.0, chunk_rows=4)
    with pytest.raises(ValueError, match="vocab_size: got 31, must be in"):
        fastkd.kd_loss(student, teacher, temperature=2.0, vocab_size=31)
    with pytest.raises(TypeError, match="student_logits: got TopK"):
        fastkd.kd_loss(teacher, student, temperature=2.0)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="inplace_backward: got True, but student_logits are a leaf"):
        fastkd.kd_loss(student, teacher, temperature=2.0, inplace_backward=True)
    for call in (fastkd.top_k, fastkd.sample_tokens):
        with pytest.raises(ValueError, match=r"(k|n): got 0, must be >= 1"):
            call(student, 0)
        with pytest.raises(ValueError, match=r"temperature: got 0\.0, must be > 0"):
            call(student, 1, temperature=0.0)
        with pytest.raises(TypeError, match="teacher: got list"):
            call([], 1)
    with pytest.raises(ValueError, match="k: got 31, must be at most 30"):
        fastkd.top_k(student, 31)
    with pytest.raises(ValueError, match="tail: got 'all', must be one of"):
        fastkd.top_k(student, 3, tail="all")


def test_what_a_gpu_does_not_look_at(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row's loss is NaN, and no other's; with FASTKD_CHECK_LABELS it raises."""
    student, teacher, _ = given_rows(device)
    teacher.ids[1, 0] = 30
    monkeypatch.setattr(_labels, "ALWAYS", True)
    with pytest.raises(ValueError, match="ids: got 30 in row 1"):
        fastkd.kd_loss(student, teacher, temperature=2.0)
    monkeypatch.setattr(_labels, "ALWAYS", False)
    monkeypatch.setattr("fastkd._sparse.check", lambda *arguments: None)
    for tail in ("bucket", "renormalize", "support", "truncate"):
        losses = fastkd.kd_loss(student, teacher._replace(tail=tail), temperature=2.0, reduction="none")
        assert losses.isnan().tolist() == [False, True, False, False]
