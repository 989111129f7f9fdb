"""What a user's type checker sees: the result's type by return_parts, and an error where a line says so."""

from torch import Tensor
from typing_extensions import assert_type

import fastkd


def good(student: Tensor, teacher: Tensor, labels: Tensor, parts: bool) -> Tensor:
    fastkd.kd_loss(student, teacher).backward()
    fastkd.kd_loss(
        student,
        teacher,
        labels,
        temperature=2,
        hard_weight=0.5,
        divergence=fastkd.JSD(0.3),
        mask=labels > 3,
        soft_mask=labels > 2,
        num_items=(3, labels.count_nonzero()),
        reduction="mean",
        backend="torch",
    ).backward()
    assert_type(fastkd.kd_loss(student, teacher, return_parts=False), Tensor)
    assert_type(fastkd.kd_loss(student, teacher, return_parts=True), fastkd.KDLossParts)
    assert_type(fastkd.kd_loss(student, teacher, return_parts=parts), Tensor | fastkd.KDLossParts)
    assert_type(fastkd.log_softmax(student), Tensor)
    loss_fn: fastkd.KDLoss = fastkd.KDLoss(temperature=2.0, divergence="tvd")
    loss_fn.temperature, loss_fn.divergence = 3, fastkd.SkewKL(0.1)
    loss_fn(student, teacher, labels, mask=labels > 3, num_items=7).backward()
    assert_type(loss_fn(student, teacher), Tensor)
    assert_type(fastkd.KDLoss(return_parts=True)(student, teacher).soft, Tensor)
    assert_type(fastkd.KDLoss(return_parts=parts)(student, teacher), Tensor | fastkd.KDLossParts)
    return loss_fn(student, teacher)


def bad(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    fastkd.kd_loss(student, teacher, return_parts=True).backward()  # error
    fastkd.kd_loss(student, teacher, temperature="2")  # error
    fastkd.kd_loss(student, teacher, labels, alpha=0.5)  # error
    fastkd.kd_loss(student, teacher, labels, 0.5)  # error
    fastkd.KDLoss(alpha=0.5)  # error
    fastkd.KDLoss(mask=labels)  # error
    fastkd.KDLoss()(student, teacher, num_items_in_batch=1)  # error
    fastkd.KDLoss().temperature = "2"  # error
