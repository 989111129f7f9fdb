"""The losses of torchtune, by component path, against torchtune's own; and right where those are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torchtune import config
from torchtune.modules import loss as theirs

from fastkd.integrations import torchtune as ours
from tests.integrations.models import check

pytestmark = pytest.mark.integration
NAMES = ("ForwardKL", "ReverseKL", "SymmetricKL")
B, S, V = 2, 12, 50


def component(name: str, **arguments: Any) -> Any:
    """As a recipe makes it of its YAML."""
    return config.instantiate(OmegaConf.create({"_component_": f"fastkd.integrations.torchtune.{name}", **arguments}))


def ratios(name: str) -> list[dict[str, float]]:
    return [{}, *({"sym_kd_ratio": ratio} for ratio in (0.0, 0.3, 1.0))] if name == "SymmetricKL" else [{}]


PAIRS = [
    (component(f"{name}{kind}", **given), getattr(theirs, f"{name}{kind}")(**given))
    for name in NAMES
    for kind in ("Loss", "WithChunkedOutputLoss")
    for given in ratios(name)
]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(V, (B, S))
    labels[0, :7] = -100
    return torch.randn(B, S, V, requires_grad=True), torch.randn(B, S, V), labels


@pytest.mark.parametrize(("mine", "other"), PAIRS, ids=lambda module: type(module).__name__)
def test_values_and_gradients(mine: Any, other: Any, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = batch
    assert mine.ignore_index == other.ignore_index
    if hasattr(other, "num_output_chunks"):
        assert mine.num_output_chunks == other.num_output_chunks
        chunks = (student.chunk(other.num_output_chunks, 1), teacher.chunk(other.num_output_chunks, 1))
        mine.num_output_chunks = other.num_output_chunks
        check(mine(*chunks, labels), other(*chunks, labels), student)
        return
    flat = (student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten())
    for normalize in (True, False):
        check(mine(*flat, normalize=normalize), other(*flat, normalize=normalize), student)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_unequal_length(name: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """As tensor_split makes them, which chunk does not."""
    student, teacher, labels = batch
    mine, whole = component(f"{name}WithChunkedOutputLoss", num_output_chunks=5), component(f"{name}Loss")
    found = mine(student.tensor_split(5, 1), teacher.tensor_split(5, 1), labels)
    check(found, whole(student, teacher, labels), student)


@pytest.mark.parametrize(("mine", "other"), PAIRS, ids=lambda module: type(module).__name__)
def test_a_batch_without_labels(mine: Any, other: Any, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """0 with a graph; torchtune's has none, or is NaN."""
    student, teacher, labels = batch[0], batch[1], torch.full((B, S), -100)
    chunked = hasattr(other, "num_output_chunks")
    arguments: Any = (student.chunk(8, 1), teacher.chunk(8, 1)) if chunked else (student, teacher)
    loss = mine(*arguments, labels)
    loss.backward()
    assert loss == 0 and student.grad is not None and not student.grad.any()
    constant = other(*arguments, labels)
    assert not constant.requires_grad or constant.isnan()


@pytest.mark.parametrize("name", NAMES)
def test_masked_tokens(name: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Logits of −inf in both: what there is without those columns. torchtune's reverse KL has NaN for a gradient."""
    student, teacher, labels = (part.detach().flatten(0, 1) if part.dim() == 3 else part.flatten() for part in batch)
    mine, other = component(f"{name}Loss"), getattr(theirs, f"{name}Loss")()
    expected = mine(student[:, 5:], teacher[:, 5:], labels)
    student[:, :5] = teacher[:, :5] = -torch.inf
    grads = []
    for loss_fn in (mine, other):
        leaf = student.clone().requires_grad_()
        loss = loss_fn(leaf, teacher, labels)
        torch.testing.assert_close(loss, expected)
        grads.append(torch.autograd.grad(loss, leaf)[0])
    assert grads[0].isfinite().all()
    assert grads[1].isnan().any() == (name != "ForwardKL")


@pytest.mark.parametrize("name", NAMES)
def test_compiled(name: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Whole, as recipes compile a loss that is not torchtune's own."""
    student, teacher, labels = batch
    mine = component(f"{name}Loss")
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    check(compiled(student, teacher, labels), mine(student, teacher, labels), student)


def test_a_recipe_step(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """The recipe's loss: class loss and distillation, on a small model of torchtune's that gives chunks."""
    from torchtune.models.llama3 import llama3

    torch.manual_seed(0)
    student, teacher = (
        llama3(vocab_size=V, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=width, max_seq_len=32)
        for width in (16, 32)
    )
    tokens, labels = torch.randint(V, (B, S)), batch[2]
    for model in (student, teacher):
        model.set_num_output_chunks(4)
    class_loss = theirs.CEWithChunkedOutputLoss(num_output_chunks=4)
    logits = student(tokens)
    with torch.no_grad():
        its = teacher(tokens)
    losses = [
        0.5 * class_loss(logits, labels) + 0.5 * kd(logits, its, labels)
        for kd in (
            component("ForwardKLWithChunkedOutputLoss", num_output_chunks=4),
            theirs.ForwardKLWithChunkedOutputLoss(num_output_chunks=4),
        )
    ]
    parameters = list(student.parameters())
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for grad, expected in zip(*grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() + 1e-8)


def test_names_are_torchtunes() -> None:
    public = {name for name in vars(ours) if name.endswith("Loss") and not name.startswith("_")}
    assert public == {f"{name}{kind}" for name in NAMES for kind in ("Loss", "WithChunkedOutputLoss")}
