"""Keywords that a function does not have: refused, with what they are called here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

# What other libraries call an argument, and what to give here instead.
ELSEWHERE = {
    "alpha": "hard_weight is the cross-entropy's weight and soft_weight the divergence's (α is either, elsewhere)",
    "beta": "soft_weight is the divergence's weight; a divergence's own number is given to it: see divergence",
    "kd_ratio": "give soft_weight=kd_ratio and hard_weight=1 - kd_ratio",
    "weight_hard_loss": "it is hard_weight here",
    "weight_soft_loss": "it is soft_weight here",
    "ce_weight": "it is hard_weight here",
    "kd_weight": "it is soft_weight here",
    "T": "it is temperature here",
    "temp": "it is temperature here",
    "tau": "it is temperature here",
    "teacher_temperature": "temperature is of both: multiply teacher_logits by temperature / teacher_temperature",
    "log_target": "give logits, or log-probabilities, which are logits too: the softmax is within",
    "target": "it is labels here",
    "targets": "it is labels here",
    "attention_mask": "give mask=attention_mask.bool()",
    "loss_mask": "give mask=loss_mask.bool()",
    "weights": "it is token_weights here",
    "num_items_in_batch": "it is num_items here",
    "num_batch_labels": "it is num_items here",
    "normalizer": "it is num_items here",
    "size_average": "it is reduction here: 'mean' or 'sum'",
    "shift_labels": "nothing is shifted here: shift the labels",
}


def named_arguments(function: Function) -> Function:
    """Its ``**unknown``, there to be explained by :func:`check_keywords`, is no part of the signature that it shows."""
    signature = inspect.signature(function)
    shown = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return function


def check_keywords(
    owner: str, function: Callable[..., Any], unknown: Mapping[str, object], hints: Mapping[str, str] = ELSEWHERE
) -> None:
    """Refuse keywords that ``function`` does not have, saying what they are called here."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]
    for name in unknown:
        hint = meant(name, known, hints) or f"must be one of {', '.join(known)}"
        raise TypeError(f"{owner}: got an unknown keyword {name!r}; {hint}")


def meant(name: str, known: Collection[str], hints: Mapping[str, str] = ELSEWHERE) -> str:
    """What to write instead of ``name``, if others call one of the ``known`` so, or one is nearly called so; or ''."""
    close = difflib.get_close_matches(name, known, n=1)
    return hints.get(name) or (f"did you mean {close[0]!r}?" if close else "")
