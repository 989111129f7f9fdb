"""Checks of the public arguments. Every message names the argument, what came and what is allowed."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


def check_logits(name: str, logits: Tensor, columns: str = "V") -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}: got {type(logits).__name__}, must be a tensor")
    if logits.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got {logits.dtype}, must be float32, bfloat16, float16 or float64")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name}: got shape {tuple(logits.shape)}, must be (..., {columns}) with {columns} >= 1")


def check_temperature(temperature: float) -> None:
    check_number("temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, must be > 0")


def check_real(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: got {type(value).__name__}, must be a number")


def check_number(name: str, value: float) -> None:
    check_real(name, value)
    if not -math.inf < value < math.inf:  # not math.isfinite, which torch.compile cannot trace of a varying number
        raise ValueError(f"{name}: got {value}, must be finite")


def check_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name}: got {type(value).__name__}, must be an int")


def check_weights(hard_weight: float | None, soft_weight: float, labels: Tensor | None) -> None:
    check_number("soft_weight", soft_weight)
    if hard_weight is None:
        if labels is not None:
            raise ValueError(
                "hard_weight: got None with labels, must be a number: the weight of the cross-entropy on labels "
                "(0.0 when the labels only say which rows count)"
            )
        return
    check_number("hard_weight", hard_weight)
    if labels is None and hard_weight != 0:
        raise ValueError(f"labels: got None with hard_weight={hard_weight}, must be given for a cross-entropy term")


def check_vocabularies(student_logits: Tensor, teacher_logits: Tensor, vocab_size: int | None) -> None:
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"teacher_logits: got shape {tuple(teacher_logits.shape)}, must match student_logits' "
            f"{tuple(student_logits.shape)} in every dimension but the last; nothing broadcasts"
        )
    student, teacher = student_logits.shape[-1], teacher_logits.shape[-1]
    if vocab_size is None:
        if student != teacher:
            raise ValueError(
                f"teacher_logits: got a vocabulary of {teacher}, student_logits has {student}; they must be equal, or "
                "vocab_size must say how many leading columns are tokens of both"
            )
        return
    check_int("vocab_size", vocab_size)
    if not 1 <= vocab_size <= min(student, teacher):
        raise ValueError(f"vocab_size: got {vocab_size}, must be in [1, {min(student, teacher)}], the columns of both")


def check_per_row(
    name: str,
    value: Tensor | None,
    student_logits: Tensor,
    dtypes: tuple[torch.dtype, ...],
    of: str = "student_logits",
) -> None:
    """``value`` has one entry a row, on the device of the logits, or of what ``of`` names."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, must be a tensor")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: got {value.dtype}, must be {' or '.join(map(str, dtypes))}")
    if value.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, must be {tuple(student_logits.shape[:-1])}, "
            f"one entry a row of {of}; nothing broadcasts"
        )
    check_device(name, value, student_logits, of)


def check_device(name: str, value: Tensor, student_logits: Tensor, of: str = "student_logits") -> None:
    if value.device != student_logits.device:
        whose = f"{of}'" if of.endswith("s") else f"{of}'s"
        raise ValueError(f"{name}: got device {value.device}, must be {whose} {student_logits.device}")


def check_no_gradient(name: str, value: Tensor | None) -> None:
    if value is not None and value.requires_grad:
        raise ValueError(f"{name}: got a tensor that requires a gradient, which it would not get; detach() it")


def check_label_smoothing(label_smoothing: float) -> None:
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}, must be in [0, 1)")


def check_reduction(reduction: str, num_items: int | float | Tensor | None, student_logits: Tensor) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, must be one of {', '.join(map(repr, REDUCTIONS))}")
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items: got a value with reduction={reduction!r}, it is the denominator of 'mean' alone")
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            raise ValueError(f"num_items: got shape {tuple(num_items.shape)}, must be a number or a 0-d tensor")
        check_no_gradient("num_items", num_items)
        if num_items.device.type != "cpu":
            check_device("num_items", num_items, student_logits)
        return
    check_number("num_items", num_items)
    if not num_items > 0:
        raise ValueError(f"num_items: got {num_items}, must be > 0")


def check_inplace(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Writing the gradient over these logits must corrupt nothing that autograd cannot see."""
    if not (student_logits.requires_grad and torch.is_grad_enabled()):
        return  # no gradient will be written
    why = None
    if torch.compiler.is_compiling():
        why = "are in a compiled function, whose memory the compiler plans"
    elif student_logits.is_leaf:
        why = "are a leaf tensor, whose values the caller owns"
    elif student_logits.retains_grad:
        why = "retain their gradient, which would be written over them"
    elif student_logits._is_view():
        why = "are a view, and its base would be overwritten"
    elif not student_logits.is_contiguous():
        why = "are not contiguous"
    elif student_logits.numel() and student_logits.untyped_storage().data_ptr() == (
        teacher_logits.untyped_storage().data_ptr()
    ):
        why = "share memory with teacher_logits"
    if why:
        raise ValueError(f"inplace_backward: got True, but student_logits {why}; must be False here")


def check_hidden(student_hidden: Tensor, teacher_hidden: Tensor) -> None:
    student, teacher = tuple(student_hidden.shape), tuple(teacher_hidden.shape)
    if student[:-1] != teacher[:-1]:
        raise ValueError(
            f"teacher_hidden: got shape {teacher}, must match student_hidden's {student}; nothing broadcasts"
        )
    if student != teacher:
        raise ValueError(
            f"teacher_hidden: got a width of {teacher[-1]}, student_hidden has {student[-1]}; they must be equal, or "
            "the student's projected to the teacher's width, as fastkd.HiddenLoss does"
        )


def check_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, must be one of {', '.join(map(repr, allowed))}")
