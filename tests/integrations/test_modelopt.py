"""ModelOpt's criterion and trainer against these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt.torch.distill as mtd
import pytest
import torch
from modelopt.torch.distill.plugins.huggingface import KDTrainer as TheirKDTrainer
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from fastkd.integrations import modelopt as ours
from tests.integrations.models import arguments, check, check_steps, llama, rows, step

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("shape", [(6, 50), (2, 3, 50)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_values_and_gradients(shape: tuple[int, ...], temperature: float, reduction: str) -> None:
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    mine, other = (module.LogitsDistillationLoss(temperature, reduction) for module in (ours, mtd))
    loss, expected = mine(student, teacher), other(student, teacher)
    assert loss.shape == expected.shape
    weights = torch.rand(loss.shape)
    check((loss * weights).sum(), (expected * weights).sum(), student)


def test_defaults_are_modelopts() -> None:
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    mine = ours.LogitsDistillationLoss()
    assert isinstance(mine, _Loss)
    torch.testing.assert_close(mine(student, teacher), mtd.LogitsDistillationLoss()(student, teacher))
    with pytest.raises(ValueError, match="reduction: got 'average'"):
        ours.LogitsDistillationLoss(reduction="average")


class Network(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, width), nn.Linear(width, 50)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).relu())


@pytest.mark.parametrize("layer", [None, "head"])
def test_in_mtd_convert(layer: str | None) -> None:
    """As the criterion of the outputs, or of a layer's: the same step of a model."""
    teacher = Network(32)
    inputs, grads = torch.randn(6, 8), []
    for criterion in (ours.LogitsDistillationLoss(2.0, "batchmean"), mtd.LogitsDistillationLoss(2.0, "batchmean")):
        torch.manual_seed(1)
        config = {
            "teacher_model": teacher,
            "criterion": criterion if layer is None else {(layer, layer): criterion},
            "loss_balancer": None if layer is None else mtd.StaticLossBalancer([1.0]),
        }
        model: Any = mtd.convert(Network(16), mode=[("kd_loss", config)])
        model(inputs)
        loss = model.compute_kd_loss(**({} if layer is None else {"student_loss": torch.zeros(())}))
        parameters = [model.body.weight, model.head.weight, model.head.bias]
        grads.append((loss, torch.autograd.grad(loss, parameters)))
    (mine, mine_grads), (other, other_grads) = grads
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
    for grad, expected in zip(mine_grads, other_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-7)


ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def trainer(cls: Any, folder: Path, **given: Any) -> Any:
    settings = {"teacher_model": llama(32, seed=2), "temperature": 2.0, "distill": True}
    args = arguments(folder, **given)
    return cls(llama(16, seed=1), args, distill_args=settings, train_dataset=rows(), eval_dataset=rows())


def test_a_step_of_the_trainer(tmp_path: Path) -> None:
    """ModelOpt's of one batch; and of four the same again, where ModelOpt's is four times that of the means."""
    expected = step(trainer(TheirKDTrainer, tmp_path))
    check_steps(step(trainer(ours.KDTrainer, tmp_path)), expected)
    check_steps(step(trainer(ours.KDTrainer, tmp_path, **ACCUMULATED)), expected)
    theirs = step(trainer(TheirKDTrainer, tmp_path, **ACCUMULATED))[1]["lm_head.weight"]
    assert theirs.norm() > 2.5 * expected[1]["lm_head.weight"].norm()


def test_rows_without_labels(tmp_path: Path) -> None:
    """All count that have a next token."""
    unlabelled = {name: torch.stack([row[name] for row in rows()]) for name in ("input_ids", "attention_mask")}
    losses = []
    for cls in (ours.KDTrainer, TheirKDTrainer):
        made = trainer(cls, tmp_path)
        losses.append((made.compute_loss(made.model.train(), unlabelled), made.model.lm_head.weight))
    (loss, weight), (expected, other) = losses
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    grads = torch.autograd.grad(loss, weight) + torch.autograd.grad(expected, other)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


def test_evaluation(tmp_path: Path) -> None:
    found = [trainer(cls, tmp_path).evaluate() for cls in (TheirKDTrainer, ours.KDTrainer)]
    for name in ("eval_loss", "eval_ce_loss"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5)
