"""torchtune's losses of distillation, to be named in a recipe's YAML; nothing of torchtune is needed to import them.

    kd_loss:
      _component_: fastkd.integrations.torchtune.ForwardKLLoss

Signatures and values are torchtune's (``torchtune/modules/loss/kd_losses.py``), so that the forward loss is the
cross-entropy of the two distributions: forward KL plus the teacher's entropy. Where torchtune's are wrong, these are
not: a batch without labels gives 0 with a graph, in every form; logits of -inf give no NaN; and mass of one model where
the other has none counts, as infinite. Nothing is shifted: torchtune's recipes shift the labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fastkd
from fastkd import Divergence


class _KLLoss(nn.Module):
    """Logits ``(..., V)``, labels ``(...)``; ``normalize``: by the number of those that are not ``ignore_index``."""

    def __init__(self, divergence: str | Divergence, ignore_index: int) -> None:
        super().__init__()
        self.divergence, self.ignore_index = divergence, ignore_index

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        return self.rows(
            student_logits, teacher_logits, labels, (labels != self.ignore_index).sum() if normalize else 1
        )

    def rows(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, num_items: Tensor | int) -> Tensor:
        return fastkd.kd_loss(
            student_logits,
            teacher_logits,
            mask=labels != self.ignore_index,
            divergence=self.divergence,
            num_items=num_items,
        )


class ForwardKLLoss(_KLLoss):
    """The cross-entropy −Σ p_t·log p_s, whose gradient is forward KL's."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__("cross_entropy", ignore_index)


class ReverseKLLoss(_KLLoss):
    """KL(p_s‖p_t)."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__("reverse_kl", ignore_index)


class SymmetricKLLoss(_KLLoss):
    """``r`` times :class:`ForwardKLLoss` plus ``1 − r`` times :class:`ReverseKLLoss`, ``r`` being ``sym_kd_ratio``."""

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(fastkd.SymmetricKL(forward=sym_kd_ratio), ignore_index)
        self.sym_kd_ratio = sym_kd_ratio

    def rows(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, num_items: Tensor | int) -> Tensor:
        divergence = super().rows(student_logits, teacher_logits, labels, num_items)
        with torch.no_grad():
            entropy = fastkd.kd_loss(
                teacher_logits,
                teacher_logits,
                mask=labels != self.ignore_index,
                divergence="cross_entropy",
                num_items=num_items,
            )
        return divergence + self.sym_kd_ratio * entropy


class _Chunked(nn.Module):
    """Lists of logits ``(batch, length of the chunk, V)``, and labels ``(batch, length)``."""

    def __init__(self, loss: _KLLoss, num_output_chunks: int) -> None:
        super().__init__()
        self.num_output_chunks, self.ignore_index, self.loss = num_output_chunks, loss.ignore_index, loss

    def forward(self, student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        parts = torch.split(labels, [chunk.shape[1] for chunk in student_logits], dim=1)
        num_items = (labels != self.ignore_index).sum()
        losses = [
            self.loss.rows(student, teacher, part, num_items)
            for student, teacher, part in zip(student_logits, teacher_logits, parts, strict=True)
        ]
        return torch.stack(losses).sum()


class ForwardKLWithChunkedOutputLoss(_Chunked):
    """:class:`ForwardKLLoss` of lists of logits."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(ForwardKLLoss(ignore_index), num_output_chunks)


class ReverseKLWithChunkedOutputLoss(_Chunked):
    """:class:`ReverseKLLoss` of lists of logits."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(ReverseKLLoss(ignore_index), num_output_chunks)


class SymmetricKLWithChunkedOutputLoss(_Chunked):
    """:class:`SymmetricKLLoss` of lists of logits."""

    def __init__(self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(SymmetricKLLoss(sym_kd_ratio, ignore_index), num_output_chunks)
