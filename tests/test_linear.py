"""Logits that are not there yet: products, memory, autograd and autocast around them, and bad arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import LinearLogits, _linear
from fastkd._request import NUM_STATS, Place, RowSpec
from tests.backends.test_linear import COLUMNS, TEACHER_WIDTH, WIDTH, leaves, source, tensors, whole
from tests.cases import without_last

BOTH = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7}


@pytest.fixture
def given(device: str) -> tuple[LinearLogits, LinearLogits, Tensor]:
    """(student, teacher, labels) of 7 rows; the student's tensors require a gradient."""
    student, teacher = (source((7,), torch.float32, width, device) for width in (WIDTH, TEACHER_WIDTH))
    student = leaves(student)
    assert isinstance(student, LinearLogits)
    return student, teacher, torch.randint(0, COLUMNS, (7,), device=device)


def loss_of(student: Any, teacher: Any, labels: Tensor | None, **keys: Any) -> Tensor:
    return fastkd.kd_loss(student, teacher, labels, **{"chunk_rows": 3} | BOTH | keys)


def gradients(student: LinearLogits, teacher: Any, labels: Tensor, **keys: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_of(student, teacher, labels, **keys).sum(), tensors(student))


@pytest.mark.parametrize(
    ("frozen", "products"),
    [((), 4), (("hidden",), 3), (("weight",), 3), (("hidden", "weight"), 2), (("hidden", "weight", "bias"), 2)],
)
def test_a_chunk_costs_only_the_products_that_are_wanted(
    given: Any, multiplied: list[torch.Size], frozen: tuple[str, ...], products: int
) -> None:
    """Both logits, and a gradient each; those of a scalar loss in forward, where backward multiplies nothing."""
    student, teacher, labels = given
    student = student._replace(**{name: getattr(student, name).detach() for name in frozen})
    loss = loss_of(student, teacher, labels)
    assert len(multiplied) == 3 * products  # three chunks
    if loss.requires_grad:
        loss.backward()
    assert len(multiplied) == 3 * products
    for name in ("hidden", "weight", "bias"):
        assert (getattr(student, name).grad is None) == (name in frozen)


def test_evaluation_costs_two_products(given: Any, multiplied: list[torch.Size]) -> None:
    with torch.no_grad():
        loss = loss_of(*given)
    assert len(multiplied) == 3 * 2 and not loss.requires_grad
    torch.testing.assert_close(loss, loss_of(*given).detach())


def test_rows_that_do_not_count_cost_nothing_on_a_cpu(given: Any, multiplied: list[torch.Size]) -> None:
    student, teacher = (LinearLogits(*(t.detach().cpu() for t in s[:3])) for s in given[:2])
    student, labels = leaves(student), given[2].cpu()
    labels[2:6] = -100
    gradients(student, teacher, labels)
    assert [shape[0] for shape in multiplied if shape[0] != COLUMNS] == [3, 3, 3]  # one chunk
    multiplied.clear()
    labels[:] = -100
    assert not any(grad.any() for grad in gradients(student, teacher, labels))
    assert not multiplied


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 1000, None])
def test_chunks_change_no_result(given: Any, chunk_rows: int | None) -> None:
    for reduction in ("mean", "none"):
        expected = gradients(*given, chunk_rows=2, reduction=reduction)
        found = gradients(*given, chunk_rows=chunk_rows, reduction=reduction)
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_default_number_of_rows() -> None:
    """Multiples of 128 where the budget allows, at least one row, and never beyond it."""
    for is_cpu, budget in ((True, 64 * 2**20), (False, 512 * 2**20)):
        for columns in (100, 32000, 128256, 256000):
            rows = _linear.default_chunk_rows(8 * columns, is_cpu)
            assert rows * 8 * columns <= budget and (rows % 128 == 0 or rows < 128)
            assert (rows + 128) * 8 * columns > budget
    assert _linear.default_chunk_rows(2**40, True) == 1


MEMORY = """
import torch, fastkd
from fastkd.bench.timing import peak_bytes
rows, columns = 8192, 32000
hidden, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(columns, 16, requires_grad=True)
teacher = fastkd.LinearLogits(torch.randn(rows, 8), torch.randn(columns, 8))
def call(rows=rows):
    student = fastkd.LinearLogits(hidden[:rows], weight)
    of = fastkd.LinearLogits(teacher.hidden[:rows], teacher.weight)
    fastkd.kd_loss(student, of, torch.arange(rows), hard_weight=0.5).backward()
call(256)  # what is allocated once
print(peak_bytes(call, "cpu"), rows * columns * 4)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is Linux's to tell")
def test_peak_memory() -> None:
    """Of the whole call at most a tenth of one tensor of logits, of which there would be three or more."""
    command = [sys.executable, "-c", MEMORY]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent.parent)
    assert result.returncode == 0, result.stderr
    peak, logits = map(int, result.stdout.split())
    assert 2**20 < peak <= logits // 10


def test_layouts(device: str) -> None:
    """Hidden states and logits of shifted sequences, and of any strides."""
    student, teacher = (source((3, 5), torch.float32, width, device) for width in (WIDTH, TEACHER_WIDTH))
    labels = torch.randint(0, COLUMNS, (3, 5), device=device)
    expected = gradients(leaves(student), teacher, labels)
    shifted = without_last(student.hidden).requires_grad_()
    for other in (whole(teacher, torch.float32), without_last(whole(teacher, torch.float32)), teacher):
        of_weight = student.weight.T.clone(memory_format=torch.contiguous_format).T.requires_grad_()
        labels_of = torch.stack((labels, labels), -1)[..., 0]
        leaf = student._replace(hidden=shifted, weight=of_weight, bias=student.bias.detach().requires_grad_())
        for actual, wanted in zip(gradients(leaf, other, labels_of), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_columns_of_hidden_states_in_a_row(given: Any) -> None:
    """A gradient lies as a tensor does, whatever the strides of its hidden states: it is scaled where it lies."""
    student, teacher, labels = given
    columns = student.hidden.detach().T.contiguous().T.requires_grad_()
    grads = [
        torch.autograd.grad(3.0 * loss_of(student._replace(hidden=hidden), teacher, labels), hidden)[0]
        for hidden in (columns, student.hidden)
    ]
    torch.testing.assert_close(*grads)
    assert grads[0].is_contiguous()


def test_no_rows(device: str) -> None:
    student, teacher = (source((2, 0), torch.float32, width, device) for width in (WIDTH, TEACHER_WIDTH))
    labels = torch.zeros(2, 0, dtype=torch.int64, device=device)
    for reduction in ("mean", "none"):
        loss = loss_of(leaves(student), teacher, labels, reduction=reduction)
        assert loss.shape == (() if reduction == "mean" else (2, 0))
        for grad in gradients(leaves(student), teacher, labels, reduction=reduction):
            assert not grad.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(given: Any, reduction: str) -> None:
    loss = loss_of(*given, reduction=reduction)
    ones = torch.ones_like(loss)
    wanted = tensors(given[0])
    first, tripled, again = (
        torch.autograd.grad(loss, wanted, factor * ones, retain_graph=True) for factor in (1.0, 3.0, 1.0)
    )
    last = torch.autograd.grad(loss, wanted, ones)
    for one, three, other, final in zip(first, tripled, again, last, strict=True):
        assert torch.equal(one, other) and torch.equal(one, final)
        torch.testing.assert_close(three, 3.0 * one, rtol=1e-5, atol=1e-6)


def test_grad_output_of_a_row_that_does_not_count(given: Any) -> None:
    student, teacher, labels = given
    labels[2] = -100
    grad_output = torch.rand(7, device=labels.device)
    loss = loss_of(student, teacher, labels, reduction="none")
    expected = torch.autograd.grad(loss, tensors(student), grad_output, retain_graph=True)
    grad_output[2] = torch.inf
    for actual, wanted in zip(torch.autograd.grad(loss, tensors(student), grad_output), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(given: Any, reduction: str, frozen: str) -> None:
    student, teacher, labels = given
    student = student._replace(bias=None, **{frozen: getattr(student, frozen).detach()})
    leaf = student.hidden if frozen == "weight" else student.weight
    loss = loss_of(student, teacher, labels, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second-order gradient"):
        grad.square().sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(given: Any, reentrant: bool) -> None:
    student, teacher, labels = given

    def head(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return loss_of(LinearLogits(hidden * 1.0, weight, bias), teacher, labels)

    loss = checkpoint(head, *student[:3], use_reentrant=reentrant)
    loss.backward()
    for tensor, wanted in zip(tensors(student), gradients(*given), strict=True):
        assert tensor.grad is not None and torch.equal(tensor.grad, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(given: Any, device: str, reduction: str, dtype: torch.dtype) -> None:
    """Factors in its dtype; loss and gradients float32, and as of the casts written out, but rounded less often."""
    student, teacher, labels = given
    with torch.autocast(device, dtype):
        loss = loss_of(student, teacher, labels, reduction=reduction)
    found = torch.autograd.grad(loss.sum(), tensors(student))
    rounded = [s._replace(hidden=s.hidden.to(dtype).float(), weight=s.weight.to(dtype).float()) for s in given[:2]]
    explicit = loss_of(*rounded, labels, reduction=reduction)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, explicit, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(explicit.sum(), tensors(student))
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - wanted).norm() <= 8e-3 * wanted.norm()
    assert not torch.equal(found[1], found[1].to(dtype).float())  # the matrix' was summed in float32, and not rounded


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_autocast_compiled(given: Any, device: str) -> None:
    student, teacher, labels = given

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return loss_of(LinearLogits(hidden, weight, bias, softcap=30.0), teacher, labels)

    torch.compiler.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(*student[:3])
        results.append((loss.detach(), *torch.autograd.grad(loss, tensors(student))))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_float16_gradients_wait_for_the_loss_scale(device: str) -> None:
    """A mean's gradient over many rows is below what float16 holds, before the scale is known."""
    hidden = torch.randn(64, WIDTH, device=device).half().requires_grad_()
    weight = (torch.randn(COLUMNS, WIDTH, device=device) * 0.02).half().requires_grad_()
    teacher = torch.randn(64, COLUMNS, device=device).half()
    items = 2.0**22
    loss = fastkd.kd_loss(LinearLogits(hidden, weight), teacher, num_items=items, chunk_rows=20)
    found = torch.autograd.grad(loss * items, (hidden, weight))
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    loss = fastkd.kd_loss(LinearLogits(*wide), teacher.float(), reduction="sum")
    for actual, wanted in zip(found, torch.autograd.grad(loss, wide), strict=True):
        assert (actual.float() - wanted).norm() <= 5e-3 * wanted.norm()


def test_tied_embeddings(device: str) -> None:
    """A matrix that is used elsewhere too gets the sum of its gradients."""
    embedding = nn.Embedding(COLUMNS, WIDTH, device=device)
    tokens, labels = (torch.randint(0, COLUMNS, (7,), device=device) for _ in range(2))
    teacher = torch.randn(7, COLUMNS, device=device)
    grads = []
    for linear in (True, False):
        hidden = embedding(tokens).tanh()
        student = LinearLogits(hidden, embedding.weight)
        loss = loss_of(student, teacher, labels) if linear else loss_of(
            hidden @ embedding.weight.T, teacher, labels, chunk_rows=None
        )  # fmt: skip
        grads.append(torch.autograd.grad(loss, embedding.weight)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_teacher_gets_no_gradient(given: Any) -> None:
    student, teacher, labels = given
    leaf = leaves(teacher)
    loss = loss_of(student, leaf, labels)
    assert all(grad is None for grad in torch.autograd.grad(loss, tensors(leaf), allow_unused=True, retain_graph=True))
    frozen = LinearLogits(*(t.detach() for t in student[:3]))
    assert not loss_of(frozen, leaf, labels).requires_grad


def test_data_parallel(tmp_path: Path, given: Any) -> None:
    """The matrix is a parameter of a wrapped model, whose hooks see its gradient."""
    student, teacher, labels = given
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        head = nn.Linear(WIDTH, COLUMNS)
        head.weight.data, head.bias.data = student.weight.data.cpu(), student.bias.data.cpu()

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = head

            def forward(self, hidden: Tensor) -> LinearLogits:
                return LinearLogits(hidden, self.head.weight, self.head.bias)

        model = nn.parallel.DistributedDataParallel(Model())
        of_teacher = LinearLogits(*(t.cpu() for t in teacher[:3]))
        loss_of(model(student.hidden.detach().cpu()), of_teacher, labels.cpu()).backward()
        torch.testing.assert_close(head.weight.grad, gradients(*given)[1].cpu(), rtol=1e-5, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_module(given: Any) -> None:
    module = fastkd.KDLoss(**BOTH, chunk_rows=3, z_loss_weight=0.1)
    torch.testing.assert_close(module(*given), loss_of(*given, z_loss_weight=0.1))


@pytest.mark.parametrize("wants", [(True, True, True), (False, False, False)])
def test_the_loop_does_not_synchronise(wants: tuple[bool, ...]) -> None:
    """Meta tensors have no data: to ask for a value of theirs is an error."""
    rows, spec = 7, RowSpec(2.0, 0, 1.0, 0.0, 0.0, 0.1, COLUMNS)
    with torch.device("meta"):
        student, teacher = (source((rows,), torch.bfloat16, width, "meta", softcap=3.0) for width in (WIDTH, 8))
        losses = [torch.empty(rows), torch.empty(rows), torch.empty(rows, NUM_STATS)]
        vectors = _linear.Vectors(torch.empty(rows, dtype=torch.int64), *(torch.empty(rows) for _ in range(3)))
        grads = _linear.linear_rows(student, teacher, vectors, spec, losses, None, 3, wants, Place("torch"))
    assert [grad is not None for grad in grads] == list(wants)


def bad(**changes: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Arguments that are right but for these: fields of the student's, or keywords."""
    fields = {"hidden": torch.zeros(3, 8), "weight": torch.zeros(11, 8)}
    fields |= {name: changes.pop(name) for name in list(changes) if name in LinearLogits._fields}
    teacher = changes.pop("teacher", torch.zeros(3, 11))
    return LinearLogits(**fields), teacher, changes


BAD: list[tuple[str, type[Exception], dict[str, Any]]] = [
    (r"student_logits.weight: got shape \(11, 9\), must be \(V, 8\)", ValueError, {"weight": torch.zeros(11, 9)}),
    (r"as nn.Linear has it, the transpose", ValueError, {"weight": torch.zeros(8, 11)}),
    (r"a sharded matrix is to be gathered", ValueError, {"weight": torch.zeros(0)}),
    (r"a sharded matrix is to be gathered", ValueError, {"weight": torch.zeros(44)}),
    (r"student_logits.weight: got list, must be a tensor", TypeError, {"weight": []}),
    (r"student_logits.weight: got NoneType", TypeError, {"weight": None}),
    (r"must be hidden's torch.float32; autocast", TypeError, {"weight": torch.zeros(11, 8).half()}),
    (r"student_logits.weight: got device meta", ValueError, {"weight": torch.zeros(11, 8, device="meta")}),
    (r"student_logits.hidden: got torch.int64, must be float32", TypeError, {"hidden": torch.zeros(3, 8).long()}),
    (r"student_logits.hidden: got shape \(\), must be \(..., H\)", ValueError, {"hidden": torch.zeros(())}),
    (r"student_logits.bias: got shape \(3,\), must be \(11,\)", ValueError, {"bias": torch.zeros(3)}),
    (r"student_logits.bias: got torch.float64", TypeError, {"bias": torch.zeros(11).double()}),
    (r"student_logits.scale: got inf, must be finite", ValueError, {"scale": float("inf")}),
    (r"student_logits.scale: got str", TypeError, {"scale": "1"}),
    (r"student_logits.softcap: got 0.0, must be > 0", ValueError, {"softcap": 0.0}),
    (r"student_logits.softcap: got -3.0, must be > 0", ValueError, {"softcap": -3.0}),
    (r"teacher_logits: got shape \(4, 11\), must match", ValueError, {"teacher": torch.zeros(4, 11)}),
    (r"teacher_logits: got a vocabulary of 12", ValueError, {"teacher": torch.zeros(3, 12)}),
    (
        r"teacher_logits.weight: got shape \(11, 8\), must be \(V, 5\)", ValueError,
        {"teacher": LinearLogits(torch.zeros(3, 5), torch.zeros(11, 8))},
    ),
    (r"inplace_backward: got True with LinearLogits", ValueError, {"inplace_backward": True}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "kind", "changes"), BAD, ids=[message for message, _, _ in BAD])
def test_bad_argument(message: str, kind: type[Exception], changes: dict[str, Any]) -> None:
    student, teacher, keys = bad(**changes)
    with pytest.raises(kind, match=message):
        fastkd.kd_loss(student, teacher, **keys)


def test_chunk_rows_without_chunks() -> None:
    with pytest.raises(ValueError, match="chunk_rows: got 4 with tensors of logits"):
        fastkd.kd_loss(torch.zeros(3, 11), torch.zeros(3, 11), chunk_rows=4)


def test_a_sharded_matrix(tmp_path: Path) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.randn(11, 8), init_device_mesh("cpu", (1,)), [Shard(0)]).requires_grad_()
        student, teacher = LinearLogits(torch.randn(3, 8), weight), torch.randn(3, 11)
        with pytest.raises(TypeError, match="student_logits: got a DTensor and a tensor for hidden and weight"):
            fastkd.kd_loss(student, teacher)
        fastkd.kd_loss(student._replace(weight=weight.full_tensor()), teacher).backward()
        assert type(weight.grad) is type(weight)
    finally:
        torch.distributed.destroy_process_group()
