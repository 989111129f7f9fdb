"""The registered operators and ``torch.compile``: schemas, fake tensors, one graph, no recompiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.functional_tensor import FunctionalTensorMode

import fastkd
from fastkd import _dispatch, _traced
from fastkd._request import NUM_STATS, Place
from tests import interpreter
from tests.cases import inputs

BOTH = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7}
ROWS, COLUMNS = (2, 3), 17
# temperature, formula, c_t, c_s, w, label_smoothing, vocab_size, varying
SPEC = (2.0, 0, 1.0, 0.0, 0.0, 0.0, COLUMNS, None)
JSD = (1.0, 0, 0.5, 0.5, 0.5, 0.1, COLUMNS - 2, None)
NUMBERS = torch.tensor([1.0, 0.5, 0.5, 0.5, 0.1], dtype=torch.float64, device="cpu")
VARYING = (1.0, 0, 1.0, 0.0, 0.0, 0.0, COLUMNS - 2, NUMBERS)  # the JSD above


def rows(device: str, dtype: torch.dtype = torch.float32, z_scale: bool = False) -> tuple[Tensor | None, ...]:
    """student, teacher, labels, hard_scale, soft_scale, z_scale"""
    student, teacher, labels = inputs(ROWS, COLUMNS, dtype, device=device)
    hard_scale, soft_scale = torch.rand(ROWS, device=device), torch.rand(ROWS, device=device)
    return student, teacher, labels % (COLUMNS - 2), hard_scale, soft_scale, soft_scale if z_scale else None


def head(device: str) -> tuple[Tensor, Tensor]:
    """Hidden states and an output matrix."""
    return torch.randn(*ROWS, 4, device=device), torch.randn(COLUMNS, 4, device=device)


# scale and softcap of the student's logits and of the teacher's, the tail, autocast
NUMBERS = (1.0, None, 0.5, 30.0, "", None)
SPARSE_NUMBERS = (1.0, None, 1.0, None, "bucket", None)


def linear(device: str, chunk_rows: int | None, wants: tuple[bool, ...]) -> tuple[Any, ...]:
    bias = torch.randn(COLUMNS, device=device)
    sources = (*head(device), bias, *head(device), None, None)
    return *sources, *rows(device, z_scale=True)[2:], *VARYING, *NUMBERS, chunk_rows, list(wants)


def listed(device: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids."""
    log_probs, ids = torch.randn(*ROWS, COLUMNS - 2, device=device).log_softmax(-1).topk(3)
    return log_probs, ids


def stats(device: str) -> Tensor:
    return torch.rand(*ROWS, NUM_STATS, device=device)


CALLS: dict[str, tuple[str, Callable[[str], tuple[Any, ...]]]] = {
    "kd_rows": ("kd_rows", lambda device: (*rows(device), *SPEC, True)),
    "kd_rows_jsd": ("kd_rows", lambda device: (*rows(device, torch.bfloat16), *JSD, True)),
    "kd_rows_varying": ("kd_rows", lambda device: (*rows(device, torch.bfloat16), *VARYING, True)),
    "kd_rows_loss": ("kd_rows", lambda device: (*rows(device), *SPEC, False)),
    "kd_rows_soft": ("kd_rows", lambda device: (*rows(device)[:2], None, None, *rows(device)[4:], *SPEC, True)),
    "kd_rows_hard": ("kd_rows", lambda device: (rows(device)[0], None, *rows(device)[2:4], None, None, *SPEC, True)),
    "kd_rows_z_loss": ("kd_rows", lambda device: (*rows(device, z_scale=True), *SPEC, True)),
    "kd_rows_": ("kd_rows_", lambda device: (*rows(device), *SPEC)),
    "kd_grad": ("kd_grad", lambda device: (*rows(device), stats(device), *SPEC)),
    "kd_grad_varying": ("kd_grad", lambda device: (*rows(device), stats(device), *VARYING)),
    "kd_grad_": ("kd_grad_", lambda device: (*rows(device), stats(device), *JSD)),
    "linear_rows": ("linear_rows", lambda device: linear(device, 5, (True, True, True))),
    "linear_rows_loss": ("linear_rows", lambda device: linear(device, None, (False, False, False))),
    "linear_rows_of_logits": (
        "linear_rows",
        lambda device: (
            rows(device)[0], None, None, *head(device), None, None, *rows(device)[2:], *JSD, *NUMBERS, 3,
            [True, False, False],
        ),
    ),
    "linear_rows_sparse": (
        "linear_rows",
        lambda device: (
            *head(device), None, listed(device)[0], None, None, listed(device)[1], *rows(device)[2:], *VARYING,
            *SPARSE_NUMBERS, 3, [True, True, False],
        ),
    ),
    "sparse_rows_": (
        "sparse_rows_",
        lambda device: (rows(device)[0], *listed(device), *rows(device, z_scale=True)[2:], *JSD, "truncate"),
    ),
    "hidden_rows": ("hidden_rows", lambda device: (*rows(device)[:2], rows(device)[3], 0, True)),
    "hidden_rows_loss": ("hidden_rows", lambda device: (*rows(device, torch.bfloat16)[:2], rows(device)[3], 1, False)),
    "scale_": ("scale_", lambda device: (rows(device)[0], torch.tensor(2.0, device=device))),
    "log_softmax": ("log_softmax", lambda device: (rows(device)[0], 2.0, None, torch.bfloat16)),
    "log_softmax_backward": (
        "log_softmax_backward", lambda device: (*rows(device)[:2], torch.rand(*ROWS, 2, device=device), 2.0, None)
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(backend: str, device: str, call: str) -> None:
    """Schema, fake implementation and autograd registration agree with what the operator does."""
    name, arguments = CALLS[call]
    operation = "rest_rows" if "sparse" in call else name
    if why := _dispatch.refusal(torch.zeros(1, 1, device=device), backend, None, operation):
        pytest.skip(why)
    operator = getattr(torch.ops.fastkd, name).default
    takes_place = operator._schema.arguments[-1].name == "width"
    torch.library.opcheck(operator, (*arguments(device), *(Place(backend) if takes_place else (backend,))))


def test_every_operator_is_checked() -> None:
    everything = torch._C._dispatch_get_all_op_names()
    registered = {name.partition("::")[2] for name in everything if name.startswith("fastkd::")}
    assert registered == {name for name, _ in CALLS.values()}


# What PyTorch's compiler warns its own parts of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def of(hidden: Tensor, scale: float = 1.0) -> fastkd.LinearLogits:
    """As many logits as hidden states."""
    return fastkd.LinearLogits(
        hidden, torch.eye(COLUMNS, device=hidden.device).to(hidden.dtype), scale=scale, softcap=20.0
    )


def sparse(logits: Tensor, tail: str = "bucket") -> fastkd.TopK:
    return fastkd.TopK(*logits.log_softmax(-1).topk(3)[::-1], temperature=2.0, tail=tail)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mean": lambda z, u, y, **keys: fastkd.kd_loss(z, u, y, **keys, **BOTH),
    "sum": lambda z, u, y, **keys: fastkd.kd_loss(z, u, y, reduction="sum", **keys, **BOTH),
    "none": lambda z, u, y, **keys: fastkd.kd_loss(z, u, y, reduction="none", **keys, **BOTH).square().sum(),
    "soft": lambda z, u, y, **keys: fastkd.kd_loss(z, u, mask=y > 3, divergence=fastkd.JSD(0.5), **keys),
    "weighted": lambda z, u, y, **keys: fastkd.kd_loss(z, u, y, token_weights=z[..., 0].detach(), **keys, **BOTH),
    "items": lambda z, u, y, **keys: fastkd.kd_loss(z, u, y, num_items=(y >= 0).sum(), **keys, **BOTH),
    "parts": lambda z, u, y, **keys: fastkd.kd_loss(z, u, y, return_parts=True, **keys, **BOTH)[0],
    "soft_mask": lambda z, u, y, **keys: fastkd.kd_loss(z, u, y, soft_mask=y > 3, mask=y < 9, **keys, **BOTH),
    "linear": lambda z, u, y, **keys: fastkd.kd_loss(of(z), of(u, 0.5), y, chunk_rows=4, **keys, **BOTH),
    "linear_none": lambda z, u, y, **keys: fastkd.kd_loss(of(z), u, y, reduction="none", **keys, **BOTH).square().sum(),
    "linear_teacher": lambda z, u, y, **keys: fastkd.KDLoss(**BOTH, z_loss_weight=0.1, **keys)(z, of(u), y),
    "sparse": lambda z, u, y, **keys: fastkd.kd_loss(z, sparse(u), y, **keys, **BOTH),
    "sparse_none": lambda z, u, y, **keys: (
        fastkd.kd_loss(of(z), sparse(u, "truncate"), y, divergence=fastkd.JSD(0.3), reduction="none", **keys, **BOTH)
        .square()
        .sum()
    ),
    "module": lambda z, u, y, **keys: fastkd.KDLoss(**BOTH, **keys)(z, u, y),
    "log_softmax": lambda z, u, y, **keys: -(u * fastkd.log_softmax(z, temperature=2.0, **keys)).sum(),
    "hidden": lambda z, u, y, **keys: fastkd.hidden_loss(z, u, mask=y > 3, **keys),
    "hidden_none": lambda z, u, y, **keys: fastkd.hidden_loss(z, u, reduction="none", **keys).square().sum(),
    "hidden_module": lambda z, u, y, **keys: fastkd.HiddenLoss([(0, 0)], COLUMNS, COLUMNS, kind="cosine", **keys)(
        [z], [u], mask=y > 3
    ),
}


def gradient(loss: Callable[..., Tensor], hidden: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, gradient)"""
    hidden = hidden.detach().requires_grad_()
    value = loss(hidden, *rest)
    value.backward(torch.tensor(0.5, device=value.device))
    assert hidden.grad is not None
    return value.detach(), hidden.grad


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", _dispatch.NAMES)
def test_compile(device: str, backend: str, name: str) -> None:
    """One graph, and what eager gives, value and gradient."""
    operation = {"hidden": "hidden_rows", "sparse": "rest_rows"}.get(name.partition("_")[0], "kd_rows")
    if why := _dispatch.refusal(torch.zeros(1, 1, device=device), backend, None, operation):
        pytest.skip(why)
    if backend == "triton":
        interpreter.mend()
    given = inputs(ROWS, COLUMNS, device=device)

    def loss(*tensors: Tensor) -> Tensor:
        return LOSSES[name](*tensors, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(gradient(compiled, *given), gradient(loss, *given), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["mean", "none", "hidden"])
def test_compile_with_inductor(device: str, name: str) -> None:
    """The default compiler, which plans memory and generates code around the operators."""
    given = inputs(ROWS, COLUMNS, torch.bfloat16, device=device)
    compiled = torch.compile(LOSSES[name], fullgraph=True)
    for actual, expected in zip(gradient(compiled, *given), gradient(LOSSES[name], *given), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-2 if actual.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


# Numbers that stand in the code stay numbers under dynamic=True.
SHAPED: dict[str, Callable[..., Tensor]] = {
    "sparse": lambda z, u, y: fastkd.kd_loss(z, sparse(u), y, temperature=2.0, hard_weight=0.3),
    "mean": lambda z, u, y: fastkd.kd_loss(z, u, y, temperature=2.0, hard_weight=0.3),
    "none": lambda z, u, y: fastkd.kd_loss(z, u, y, temperature=2.0, hard_weight=0.3, reduction="none").square().sum(),
    "log_softmax": lambda z, u, y: -(u * fastkd.log_softmax(z, temperature=2.0)).sum(),
    "hidden": lambda z, u, y: fastkd.hidden_loss(z, u, kind="cosine"),
    "hidden_none": lambda z, u, y: fastkd.hidden_loss(z, u, reduction="none").square().sum(),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", SHAPED)
def test_dynamic_shapes(device: str, name: str) -> None:
    """Neither another number of rows nor another vocabulary compiles again, once a dimension is known to vary."""
    graphs = []

    def count(module: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    compiled = torch.compile(SHAPED[name], fullgraph=True, backend=count, dynamic=True)
    for shape, columns in (((2, 3), 17), ((4, 3), 19), ((5, 7), 40), ((6, 2), 129)):
        given = inputs(shape, columns, device=device)
        for actual, expected in zip(gradient(compiled, *given), gradient(SHAPED[name], *given), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    assert len(graphs) == 1


def test_numbers_in_a_tensor(device: str) -> None:
    """The operators read them there, and not in their other arguments."""
    given = rows(device, torch.bfloat16)
    for name, extra in (("kd_rows", (True,)), ("kd_grad", ())):
        operator = getattr(torch.ops.fastkd, name)
        before = (stats(device),) if name == "kd_grad" else ()
        left, right = (operator(*given, *before, *spec, *extra, *Place("torch")) for spec in (JSD, VARYING))
        for one, other in zip(left, right, strict=True):
            assert torch.equal(one, other)


STEPS = [0.05 + 0.04 * step for step in range(20)]
# What may change at every step. 20 values are more than the graphs that PyTorch allows.
SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "temperature": lambda step, *given: fastkd.kd_loss(*given, **BOTH | {"temperature": 4.0 * step}),
    "hard_weight": lambda step, *given: fastkd.kd_loss(*given, **BOTH | {"hard_weight": step}),
    "soft_weight": lambda step, *given: fastkd.kd_loss(*given, **BOTH | {"soft_weight": step}),
    "label_smoothing": lambda step, *given: fastkd.kd_loss(*given, **BOTH, label_smoothing=step),
    "num_items": lambda step, *given: fastkd.kd_loss(*given, **BOTH, num_items=100.0 * step),
    "jsd": lambda step, *given: fastkd.kd_loss(*given, **BOTH, divergence=fastkd.JSD(step)),
    "skew_kl": lambda step, *given: fastkd.kd_loss(*given, **BOTH, divergence=fastkd.SkewKL(step)),
    "symmetric_kl": lambda step, *given: fastkd.kd_loss(*given, **BOTH, divergence=fastkd.SymmetricKL(step)),
    "sparse": lambda step, z, u, y: fastkd.kd_loss(
        z, sparse(u), y, temperature=2.0, hard_weight=step, divergence=fastkd.JSD(step)
    ),
    "own": lambda step, *given: fastkd.kd_loss(*given, **BOTH, divergence=fastkd.Divergence("own", step, 1.0, 0.3)),
    "all_at_once": lambda step, *given: fastkd.kd_loss(
        *given, temperature=1 + step, hard_weight=step, soft_weight=1 - step, label_smoothing=step,
        divergence=fastkd.JSD(step), reduction="none",
    ).sum(),
    "log_softmax": lambda step, z, u, y: (u * fastkd.log_softmax(z, temperature=4.0 * step)).sum(),
}  # fmt: skip


def check_schedule(device: str, compiled: Callable[..., Tensor], eager: Callable[..., Tensor], *step: float) -> None:
    given = inputs(ROWS, COLUMNS, device=device)
    for actual, expected in zip(
        gradient(lambda *tensors: compiled(*step, *tensors), *given),
        gradient(lambda *tensors: eager(*step, *tensors), *given),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(device: str, name: str) -> None:
    """Numbers that change at every step: two graphs, one of which takes them as they come."""
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(SCHEDULES[name], fullgraph=True, backend=graphs)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for step in STEPS:
            check_schedule(device, compiled, SCHEDULES[name], step)
    assert graphs.frame_count == 2


def test_a_number_that_became_known_stays_in_its_tensor() -> None:
    """Between Dynamo's trace, which left it out of the other arguments, and the next."""
    with FunctionalTensorMode():
        assert _traced.varying(0.5) is not None


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_schedule_of_a_module(device: str, compiler: str) -> None:
    """Its attributes, integers too; a scheduler sets them outside the compiled function."""
    module = fastkd.KDLoss(**BOTH)
    graphs = CompileCounterWithBackend(compiler)
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for count, step in enumerate(STEPS, start=1):
            module.temperature, module.hard_weight, module.soft_weight = count, step, 1.0 - step
            module.label_smoothing, module.divergence = step, fastkd.JSD(step)
            check_schedule(device, compiled, module)
    assert graphs.frame_count == 2


@pytest.mark.usefixtures("fresh_compiler")
def test_schedule_with_inductor(device: str) -> None:
    """Whose compiled code makes the tensor of numbers."""
    compiled = torch.compile(SCHEDULES["all_at_once"], fullgraph=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for step in STEPS:
            check_schedule(device, compiled, SCHEDULES["all_at_once"], step)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_refuses_in_place(device: str) -> None:
    """The compiler plans the memory that would be overwritten."""
    given = inputs(ROWS, COLUMNS, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(hidden: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return fastkd.kd_loss(hidden * 2, teacher, labels, inplace_backward=True, **BOTH)

    with pytest.raises(Exception, match="inplace_backward: got True, but student_logits are in a compiled function"):
        loss(given[0].requires_grad_(), *given[1:])


def test_fake_tensors(backend: str) -> None:
    """Shapes and dtypes without data: what a planner of memory sees."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        student = torch.empty(2, 3, 50257, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(2, 3, dtype=torch.int64)
        for reduction, shape in (("mean", ()), ("none", (2, 3))):
            loss = fastkd.kd_loss(student, student.detach(), labels, reduction=reduction, backend=backend, **BOTH)
            assert (loss.shape, loss.dtype) == (shape, torch.float32)
            (grad,) = torch.autograd.grad(loss.sum(), student)
            assert (grad.shape, grad.dtype) == (student.shape, torch.bfloat16)
