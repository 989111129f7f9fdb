"""The module: the function with its keywords stored, no more and no fewer."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import fastkd
from tests.cases import inputs

PER_CALL = ("student_logits", "teacher_logits", "labels", "mask", "token_weights", "num_items")


def test_the_keywords_of_the_function() -> None:
    """Each keyword is the constructor's or the call's, with the function's default."""
    function = inspect.signature(fastkd.kd_loss).parameters
    stored = inspect.signature(fastkd.KDLoss.__init__).parameters
    called = inspect.signature(fastkd.KDLoss.forward).parameters
    assert list(called) == ["self", *PER_CALL]
    assert [name for name in function if name not in PER_CALL] == [name for name in stored if name != "self"]
    for parameters in (stored, called):
        for name, parameter in parameters.items():
            if name != "self":
                assert (parameter.default, parameter.kind) == (function[name].default, function[name].kind)


def test_the_loss_of_the_function() -> None:
    student, teacher, labels = inputs((2, 3), 17)
    keywords = {
        "temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7, "divergence": fastkd.JSD(0.3), "vocab_size": 15,
        "scale_soft_by_t2": False, "label_smoothing": 0.1, "ignore_index": 3, "reduction": "sum", "return_parts": True,
        "backend": "torch",
    }  # fmt: skip
    labels %= 15
    mask, weights = torch.rand(2, 3) > 0.3, torch.rand(2, 3)
    module = fastkd.KDLoss(**keywords)
    actual = module(student, teacher, labels, mask=mask, token_weights=weights)
    expected = fastkd.kd_loss(student, teacher, labels, mask=mask, token_weights=weights, **keywords)
    assert isinstance(actual, fastkd.KDLossParts)
    for left, right in zip(actual, expected, strict=True):
        assert torch.equal(left, right)


def test_num_items() -> None:
    given = inputs((3,), 17)
    module = fastkd.KDLoss(hard_weight=0.5)
    assert torch.equal(module(*given, num_items=7), fastkd.kd_loss(*given, hard_weight=0.5, num_items=7))


def test_a_wrong_name_is_found_when_made() -> None:
    with pytest.raises(ValueError, match="divergence: got 'kl'"):
        fastkd.KDLoss(divergence="kl")


def test_is_a_module() -> None:
    """It has no state, and can be copied, pickled and printed."""
    module = fastkd.KDLoss(temperature=2.0, divergence=fastkd.JSD(0.3))
    assert list(module.parameters()) == []
    assert module.state_dict() == {}
    student, teacher, _ = inputs((2,), 17)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.to(torch.bfloat16)):
        assert torch.equal(other(student, teacher), module(student, teacher))
    assert "temperature=2.0" in repr(module)
    assert "Divergence(name='jsd', c_t=0.3" in repr(module)


def test_what_a_module_keeps_elsewhere_is_no_less_an_argument() -> None:
    """A parameter is refused as by the function, and not passed over."""
    student, teacher, _ = inputs((2,), 17)
    module = fastkd.KDLoss()
    module.temperature = torch.nn.Parameter(torch.tensor(5.0))
    with pytest.raises(TypeError, match=r"^temperature: got Parameter, must be a number"):
        module(student, teacher)
    module = fastkd.KDLoss()
    module.mask = torch.zeros(2, dtype=torch.bool)  # no keyword of its constructor
    assert torch.equal(module(student, teacher), fastkd.kd_loss(student, teacher))


def test_an_attribute_is_the_keyword() -> None:
    """A schedule sets it."""
    student, teacher, _ = inputs((2,), 17)
    module = fastkd.KDLoss(temperature=2.0)
    module.temperature, module.divergence = 5.0, "reverse_kl"
    expected = fastkd.kd_loss(student, teacher, temperature=5.0, divergence="reverse_kl")
    assert torch.equal(module(student, teacher), expected)
