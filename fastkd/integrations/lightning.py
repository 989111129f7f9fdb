"""Lightning: a module that holds student, teacher and loss, with the right mean over accumulated batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

import fastkd
from fastkd import KDLoss

# What a batch's sum is divided by until the number of rows of the whole step is known. Any number does that is the
# same for all batches and devices; this one keeps gradients in float16's range.
UNIT = 1024


class KDModule(LightningModule):
    """Distillation of a student, for a ``Trainer`` of Lightning.

    The gradient of a step is that of the mean over all rows that count of all accumulated batches on all devices,
    whatever ``accumulate_grad_batches`` is, however many labels each batch has, and where an epoch ends within a step:
    of each batch the sum is taken, and the gradients are divided by the number of rows just before the optimizer's
    step, which is before they are clipped. Lightning's own is the mean of the batches' means.

    The teacher stays in ``eval()``, gets no gradient, and is not written into checkpoints. Logs ``train_loss``,
    and where both have a weight ``train_hard`` and ``train_soft``, of each batch; ``val_loss``, ``val_hard`` and
    ``val_soft`` are means over all rows that count.

    Args:
        student: what is trained.
        teacher: its parameters' ``requires_grad`` is turned off.
        loss_fn: weights, temperature and so on; ``reduction`` must be ``"mean"``.
        optimizer: makes one of the student's parameters: ``functools.partial(torch.optim.AdamW, lr=1e-4)``. Or override
            ``configure_optimizers``.

    Override :meth:`distil` for other batches, or models, than it has.

    Raises:
        ValueError: ``reduction``; what :func:`fastkd.kd_loss` refuses, when it runs.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss_fn: KDLoss[Any],
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    ) -> None:
        super().__init__()
        if loss_fn.reduction != "mean":
            raise ValueError(f"loss_fn: got reduction={loss_fn.reduction!r}, must be 'mean'")
        self.student, self.teacher, self.loss_fn, self.optimizer = student, teacher.eval(), loss_fn, optimizer
        teacher.requires_grad_(False)
        self._rows = torch.tensor(0)  # that count, since the last step

    def distil(self, batch: Any) -> tuple[Any, Any, Tensor]:
        """The student's logits, the teacher's, and labels: what :func:`fastkd.kd_loss` takes, so also what it takes
        in the place of logits. Here a batch is ``(inputs, labels)``, and models give logits of inputs."""
        inputs, labels = batch
        with torch.no_grad():
            teacher = self.teacher(inputs)
        return self.student(inputs), teacher, labels

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        student, teacher, labels = self.distil(batch)
        rows = self._count(labels)
        self._rows = self._rows.to(rows.device) + rows
        parts = self._loss(student, teacher, labels, num_items=UNIT)
        loss = parts["loss"]
        parts["loss"] = loss.detach() * UNIT / rows.clamp(min=1)
        self.log_dict({f"train_{name}": part for name, part in parts.items()})
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Lightning has divided each batch's loss by the number of batches, and averages gradients over devices.
        rows = torch.as_tensor(self.trainer.strategy.reduce(self._rows.float(), reduce_op="mean"))
        factor = UNIT * self.trainer.accumulate_grad_batches / rows.clamp(min=1)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor.to(parameter.grad.device))
        self._rows = torch.zeros_like(self._rows)

    def validation_step(self, batch: Any, batch_index: int) -> None:
        student, teacher, labels = self.distil(batch)
        parts = {f"val_{name}": part for name, part in self._loss(student, teacher, labels).items()}
        self.log_dict(parts, batch_size=int(self._count(labels)), sync_dist=True)

    def configure_optimizers(self) -> Optimizer:
        if self.optimizer is None:
            raise ValueError("optimizer: got None; give one, or override configure_optimizers")
        return self.optimizer(self.student.parameters())

    def train(self, mode: bool = True) -> KDModule:
        super().train(mode)
        self.teacher.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if not name.startswith("teacher.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"].update(self.teacher.state_dict(prefix="teacher."))

    def _loss(self, student: Any, teacher: Any, labels: Tensor, **keywords: Any) -> dict[str, Tensor]:
        """The loss; and its two terms if both have a weight, or in validation: alone, one would cost a pass."""
        settings = self.loss_fn.keywords()
        parts = bool(settings["hard_weight"] and settings["soft_weight"]) or not torch.is_grad_enabled()
        result = fastkd.kd_loss(student, teacher, labels, **{**settings, "return_parts": parts}, **keywords)
        return result._asdict() if parts else {"loss": result}

    def _count(self, labels: Tensor) -> Tensor:
        return (labels != self.loss_fn.ignore_index).sum()
