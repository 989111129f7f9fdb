"""Checks of the public arguments. Every message names the argument, what came and what is allowed."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from fastkd._request import Formula
from fastkd.sources import LinearLogits, TopK

STRIDED = torch.strided
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
TAILS = ("bucket", "renormalize", "support", "truncate")

# The way to what an argument does not do: a tensor where a number is wanted, and values of a wrong type or dtype.
_A_CALL_FOR_EACH = (
    "; one that learns, or of a row, multiplies the loss of a call for its term alone (the other's weight 0)"
)
_NOT_A_NUMBER = {
    "temperature": "; for one a row divide both logits by it, at temperature 1, and give its square as token_weights",
    "hard_weight": _A_CALL_FOR_EACH,
    "soft_weight": _A_CALL_FOR_EACH,
}
_NOT_PER_ROW = {
    "mask": "; an attention mask of 0 and 1 becomes one by .bool()",
    "soft_mask": "; an attention mask of 0 and 1 becomes one by .bool()",
    "token_weights": "; they weigh both terms: weights for one are those of a call for it alone (the other's weight 0)",
}


def check_logits(name: str, logits: Tensor, columns: str = "V", least: int = 1) -> None:
    _check_tensor(name, logits)
    if logits.dim() < 1 or logits.shape[-1] < least:
        raise ValueError(f"{name}: got shape {tuple(logits.shape)}, must be (..., {columns}) with {columns} >= {least}")


def _check_tensor(name: str, value: Tensor) -> None:
    """A dense tensor of real numbers."""
    if not isinstance(value, Tensor):
        way = ", such as the logits of this" if hasattr(value, "logits") else ""
        raise TypeError(f"{name}: got {type(value).__name__}, must be a tensor{way}")
    if type(value) is not Tensor or value.layout is not STRIDED or value.is_nested:
        check_dense(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got {value.dtype}, must be float32, bfloat16, float16 or float64")


def check_dense(name: str, value: Tensor) -> None:
    """Kernels read memory by address and stride."""
    if value.is_nested:
        raise TypeError(f"{name}: got a nested tensor, must be dense; values() of a jagged one is (tokens, ...)")
    if value.layout is not STRIDED:
        raise TypeError(f"{name}: got layout {value.layout}, must be dense: to_dense()")
    if is_dtensor(value):
        raise TypeError(
            f"{name}: got a DTensor, must be a tensor: full_tensor(), or to_local() if rows alone are sharded"
        )


def check_linear(name: str, source: LinearLogits, autocast: bool, least: int = 1) -> None:
    """Whose ``hidden`` is one, and whose matrix has at least so many rows."""
    hidden, weight, bias, scale, softcap = source
    width = hidden.shape[-1]
    for of, given in ((f"{name}.weight", weight), (f"{name}.bias", weight if bias is None else bias)):
        _check_tensor(of, given)
        if given.dtype != hidden.dtype and not autocast:
            raise TypeError(f"{of}: got {given.dtype}, must be hidden's {hidden.dtype}; autocast brings both to one")
        if given.device != hidden.device:
            raise ValueError(f"{of}: got device {given.device}, must be hidden's {hidden.device}")
    if weight.dim() != 2 or len(weight) < least or not weight.shape[1]:
        raise ValueError(
            f"{name}.weight: got shape {tuple(weight.shape)}, must be (V, {width}); a sharded matrix is to be gathered "
            "(FSDP.summon_full_params, deepspeed.zero.GatheredParameters)"
        )
    if weight.shape[1] != width:
        way = "; it is as nn.Linear has it, the transpose of this" if weight.shape[0] == width else ""
        raise ValueError(
            f"{name}.weight: got shape {tuple(weight.shape)}, must be (V, {width}), the width of hidden{way}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}.bias: got shape {tuple(bias.shape)}, must be ({len(weight)},), one a row of weight")
    check_number(f"{name}.scale", scale)
    if softcap is not None:
        check_number(f"{name}.softcap", softcap)
        if not softcap > 0:
            raise ValueError(f"{name}.softcap: got {softcap}, must be > 0, or None for none")


def check_ids(name: str, ids: Tensor) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: got {type(ids).__name__}, must be a tensor")
    check_dense(name, ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got {ids.dtype}, must be torch.int32 or torch.int64")


def check_top_k(name: str, source: TopK, student_logits: Tensor, temperature: float) -> None:
    """What it lists is looked at where that waits for nothing, with the labels."""
    ids, log_probs = source.ids, source.log_probs  # PyTorch 2.6 compiles no slice of a named tuple
    _check_tensor(f"{name}.log_probs", log_probs)
    check_ids(f"{name}.ids", ids)
    if ids.dim() < 1 or ids.shape[-1] < 1 or ids.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"{name}.ids: got shape {tuple(ids.shape)}, must be {(*student_logits.shape[:-1], 'K')} with K >= 1, "
            "student_logits' in every dimension but the last; nothing broadcasts".replace("'K'", "K")
        )
    if log_probs.shape != ids.shape:
        raise ValueError(
            f"{name}.log_probs: got shape {tuple(log_probs.shape)}, must be that of ids, {tuple(ids.shape)}"
        )
    check_device(f"{name}.ids", ids, student_logits)
    check_device(f"{name}.log_probs", log_probs, student_logits)
    check_one_of(f"{name}.tail", source.tail, TAILS)
    check_number(f"{name}.temperature", source.temperature)
    if source.temperature != temperature:
        raise ValueError(
            f"temperature: got {temperature} with log-probabilities of a teacher at temperature {source.temperature}, "
            "must be the same"
        )


def check_tail(name: str, tail: str, formula: Formula, w: float) -> None:
    has_reverse = formula == Formula.SYMMETRIC_KL or (formula == Formula.MIXTURE_KL and w == 1.0)
    if tail == "renormalize" and has_reverse:
        raise ValueError(
            f"{name}.tail: got 'renormalize' with a divergence that is infinite where the teacher has no mass, as a "
            "reverse KL is; must be 'bucket', 'support' or 'truncate'"
        )


def is_dtensor(value: Tensor) -> bool:
    """By its name, since importing the class imports most of torch.distributed."""
    return type(value) is not Tensor and type(value).__name__ == "DTensor"


def has_dtensor(*values: object) -> bool:
    """Whether one of these tensors, or of the sources' tensors, is one."""
    for value in values:
        if value is None or type(value) is Tensor:
            continue
        each = value if isinstance(value, (LinearLogits, TopK)) else (value,)
        if any(isinstance(tensor, Tensor) and is_dtensor(tensor) for tensor in each):
            return True
    return False


def check_temperature(temperature: float) -> None:
    check_number("temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, must be > 0")
    if temperature > 1e19:
        raise ValueError(f"temperature: got {temperature}, must be <= 1e19: T² overflows float32")


def check_real(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        way = _NOT_A_NUMBER.get(name, "") if isinstance(value, Tensor) else ""
        raise TypeError(f"{name}: got {type(value).__name__}, must be a number{way}")


def check_number(name: str, value: float) -> None:
    if type(value) is not float:
        check_real(name, value)
    if not -math.inf < value < math.inf:  # not math.isfinite, which torch.compile cannot trace of a varying number
        raise ValueError(f"{name}: got {value}, must be finite")


def check_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name}: got {type(value).__name__}, must be an int")


def check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, must be a bool")


def check_hard_weight(hard_weight: float | None) -> None:
    if hard_weight is not None:
        check_number("hard_weight", hard_weight)


def check_terms(
    hard_weight: float | None,
    soft_weight: float,
    labels: Tensor | None,
    mask: Tensor | None,
    soft_mask: Tensor | None,
) -> None:
    """The weights, and that there are labels where they are asked for, and a weight and rows for the labels."""
    check_hard_weight(hard_weight)
    check_number("soft_weight", soft_weight)
    if labels is None:
        if hard_weight is not None and hard_weight != 0:
            raise ValueError(f"labels: got None with hard_weight={hard_weight}, must be given for a cross-entropy term")
        if mask is not None and soft_mask is not None:
            raise ValueError("mask: got one with soft_mask and without labels, where there is no term left for it")
    elif hard_weight is None:
        raise ValueError(
            "hard_weight: got None with labels, must be a number: the weight of the cross-entropy on labels "
            "(0.0 when the labels only say which rows count)"
        )


def check_vocab_size(vocab_size: int | None) -> None:
    if vocab_size is not None:
        check_int("vocab_size", vocab_size)
        if vocab_size < 1:
            raise ValueError(f"vocab_size: got {vocab_size}, must be >= 1")


def check_chunk_rows(chunk_rows: int | None) -> None:
    if chunk_rows is not None:
        check_int("chunk_rows", chunk_rows)
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows: got {chunk_rows}, must be >= 1, or None for as many as fit in a budget")


def check_vocabularies(
    student_logits: Tensor, teacher_logits: Tensor, vocab_size: int | None, in_slices: int = 0
) -> None:
    """``in_slices``: columns of the whole vocabulary, if these logits are a slice of it."""
    if vocab_size is None and student_logits.shape == teacher_logits.shape:
        return
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"teacher_logits: got shape {tuple(teacher_logits.shape)}, must match student_logits' "
            f"{tuple(student_logits.shape)} in every dimension but the last; nothing broadcasts"
        )
    student, teacher = student_logits.shape[-1], teacher_logits.shape[-1]
    if in_slices and student != teacher:
        raise ValueError(
            f"teacher_logits: got a slice of {teacher} columns, student_logits has one of {student}; they must be "
            "slices of as many columns, lest they be of other tokens"
        )
    if in_slices:
        student = teacher = in_slices
    if vocab_size is None:
        if student != teacher:
            raise ValueError(
                f"teacher_logits: got a vocabulary of {teacher}, student_logits has {student}; they must be equal, or "
                "vocab_size must say how many leading columns are tokens of both"
            )
        return
    check_vocab_size(vocab_size)
    if vocab_size > min(student, teacher):
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
        raise TypeError(f"{name}: got {type(value).__name__}, must be a tensor{_NOT_PER_ROW.get(name, '')}")
    if type(value) is not Tensor or value.layout is not STRIDED or value.is_nested:
        check_dense(name, value)
    if value.dtype not in dtypes:
        allowed = " or ".join(map(str, dtypes))
        raise TypeError(f"{name}: got {value.dtype}, must be {allowed}{_NOT_PER_ROW.get(name, '')}")
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
        raise ValueError(
            f"{name}: got a tensor that requires a gradient, which it would not get; detach() it, or multiply the "
            "losses of reduction='none' by it"
        )


def check_label_smoothing(label_smoothing: float) -> None:
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}, must be in [0, 1)")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        way = "; 'mean' is over the rows that count" if reduction == "batchmean" else ""
        raise ValueError(f"reduction: got {reduction!r}, must be one of {', '.join(map(repr, REDUCTIONS))}{way}")


def check_num_items(
    num_items: int | float | Tensor | tuple[Any, Any],
    reduction: str,
    student_logits: Tensor,
    pair: bool,
    of: str = "student_logits",
) -> None:
    """A denominator, or with ``pair`` one for each term."""
    if reduction != "mean":
        raise ValueError(f"num_items: got a value with reduction={reduction!r}, it is the denominator of 'mean' alone")
    if pair != isinstance(num_items, tuple):
        allowed = "a pair with soft_mask, of the hard and of the soft term" if pair else "a number or a tensor"
        raise TypeError(f"num_items: got {type(num_items).__name__}, must be {allowed}")
    each = num_items if isinstance(num_items, tuple) else (num_items,)
    if len(each) != 1 + pair:
        raise ValueError(f"num_items: got {len(each)}, must be two, of the hard and of the soft term")
    for items in each:
        if not isinstance(items, Tensor):
            check_number("num_items", items)
            if items < 0:
                raise ValueError(f"num_items: got {items}, must be >= 0")
            continue
        if items.dtype == torch.bool or items.is_complex():
            raise TypeError(f"num_items: got {items.dtype}, must be a number, or a tensor of an integer or float dtype")
        if items.numel() != 1:
            raise ValueError(f"num_items: got shape {tuple(items.shape)}, must be a number or have one element")
        check_no_gradient("num_items", items)
        if items.device.type != "cpu":
            check_device("num_items", items, student_logits, of)


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
