"""The losses that the demo compares: one signature, so that a training loop changes by one line."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

import fastkd

# (student logits [N, V], teacher logits [N, V] or None, labels [N], temperature, weight of the labels) -> scalar
Loss = Callable[[Tensor, Tensor | None, Tensor, float, float], Tensor]
HiddenLoss = Callable[[fastkd.LinearLogits, fastkd.LinearLogits | None, Tensor, float, float], Tensor]
CachedLoss = Callable[[Tensor, fastkd.TopK | None, Tensor, float, float], Tensor]
CHUNK_ROWS = 128
CACHED_K = 32  # of each token, what a cache of the teacher keeps


def labels_only(
    student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float, hard_weight: float
) -> Tensor:
    return F.cross_entropy(student, labels)


def usual_kd(student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float, hard_weight: float) -> Tensor:
    assert teacher is not None
    soft = F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    return hard_weight * F.cross_entropy(student, labels) + (1.0 - hard_weight) * temperature**2 * soft


def fastkd_kd(
    student: Tensor, teacher: Tensor | fastkd.TopK | None, labels: Tensor, temperature: float, hard_weight: float
) -> Tensor:
    assert teacher is not None
    return fastkd.kd_loss(
        student, teacher, labels, temperature=temperature, hard_weight=hard_weight, soft_weight=1.0 - hard_weight
    )


def fastkd_from_hidden_states(
    student: fastkd.LinearLogits,
    teacher: fastkd.LinearLogits | None,
    labels: Tensor,
    temperature: float,
    hard_weight: float,
) -> Tensor:
    """The same loss; the number of rows is for batches whose logits are fewer than the default lets exist at once."""
    assert teacher is not None
    return fastkd.kd_loss(
        student, teacher, labels, temperature=temperature, hard_weight=hard_weight, soft_weight=1.0 - hard_weight,
        chunk_rows=CHUNK_ROWS,
    )  # fmt: skip


LOSSES: dict[str, Loss] = {"labels": labels_only, "usual": usual_kd, "fastkd": fastkd_kd}
# From what a teacher left on disk.
FROM_CACHE: dict[str, CachedLoss] = {"cache": fastkd_kd}
# For models that can stop before their logits.
FROM_HIDDEN_STATES: dict[str, HiddenLoss] = {"hidden": fastkd_from_hidden_states}
