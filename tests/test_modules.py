"""The module: the function with its keywords stored, no more and no fewer."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
from typing import Any

import pytest
import torch

import fastkd
from tests.cases import inputs
from tests.test_validate import BAD

PER_CALL = ("student_logits", "teacher_logits", "labels", "mask", "soft_mask", "token_weights", "num_items")


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


def test_soft_mask() -> None:
    student, teacher, labels = inputs((3,), 17)
    arguments = {"soft_mask": torch.tensor([True, False, True]), "num_items": (3, 2)}
    module = fastkd.KDLoss(hard_weight=0.5)
    expected = fastkd.kd_loss(student, teacher, labels, hard_weight=0.5, **arguments)
    assert torch.equal(module(student, teacher, labels, **arguments), expected)


# The bad arguments of the function that are the module's to keep, one at a time.
KEPT = [
    (name, value, kind, message)
    for changes, kind, message in BAD
    for name, value in changes.items()
    if len(changes) == 1 and name in inspect.signature(fastkd.KDLoss).parameters
    if (name, value) not in (("hard_weight", None), ("vocab_size", 9))  # bad with labels, and for these logits
]


@pytest.mark.parametrize(("name", "value", "kind", "message"), KEPT, ids=[case[-1][:45] for case in KEPT])
def test_a_bad_argument_is_found_when_made_and_when_set(
    name: str, value: Any, kind: type[Exception], message: str
) -> None:
    """With the function's message; the module is then what it was."""
    with pytest.raises(kind, match="^" + re.escape(message)):
        fastkd.KDLoss(**{name: value})
    module = fastkd.KDLoss()
    before = repr(module)
    with pytest.raises(kind, match="^" + re.escape(message)):
        setattr(module, name, value)
    assert repr(module) == before


def test_every_keyword_is_checked() -> None:
    assert {name for name, *_ in KEPT} == set(inspect.signature(fastkd.KDLoss).parameters)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "did you mean 'temperature'?"),
        ("alpha", "hard_weight is the cross-entropy's weight"),
        ("weight", "did you mean 'soft_weight'?"),
        ("vocabsize", "did you mean 'vocab_size'?"),
    ],
)
def test_a_misspelt_attribute(name: str, meant: str) -> None:
    """Is neither made nor set."""
    with pytest.raises(TypeError, match=f"^KDLoss: got an unknown keyword '{name}'; {re.escape(meant)}"):
        fastkd.KDLoss(**{name: 1.0})
    with pytest.raises(AttributeError, match=f"^KDLoss: got an unknown attribute '{name}'; {re.escape(meant)}"):
        setattr(fastkd.KDLoss(), name, 1.0)


@pytest.mark.parametrize("name", ["mask", "soft_mask", "token_weights", "num_items"])
def test_an_argument_of_the_call_is_no_attribute(name: str) -> None:
    with pytest.raises(AttributeError, match=f"^KDLoss: got an unknown attribute '{name}'; it comes at each call"):
        setattr(fastkd.KDLoss(), name, None)
    with pytest.raises(TypeError, match=f"^KDLoss: got an unknown keyword '{name}'; it comes at each call"):
        fastkd.KDLoss(**{name: None})


def test_an_unknown_keyword_of_a_call() -> None:
    student, teacher, _ = inputs((2,), 17)
    with pytest.raises(TypeError, match=r"^KDLoss.forward: got an unknown keyword 'num_items_in_batch'; it is num_"):
        fastkd.KDLoss()(student, teacher, num_items_in_batch=3)
    with pytest.raises(TypeError, match=r"^KDLoss.forward: got an unknown keyword 'temperature'; it is given to KDLos"):
        fastkd.KDLoss()(student, teacher, temperature=2.0)
    with pytest.raises(TypeError, match=r"^KDLoss.forward: got an unknown keyword 'qqq'; must be one of student_lo"):
        fastkd.KDLoss()(student, teacher, qqq=2.0)


def test_a_module_keeps_its_books() -> None:
    """What PyTorch and its frameworks set on any module: modes, hooks, wrappers, a patched forward."""
    student, teacher, _ = inputs((2,), 17)
    module = fastkd.KDLoss(temperature=2.0)
    expected = module(student, teacher)
    calls = []
    module.register_forward_hook(lambda *_: calls.append("after"))
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    assert torch.equal(module.eval().train().requires_grad_(False).to("cpu").float()(student, teacher), expected)
    module(student.requires_grad_(), teacher).backward()
    assert calls == ["before", "after", "before", "after", "backward"]
    module.forward = module.forward
    module._framework, module.ds_id, module.pre_bwd_fn = "its own", 1, None
    parent = torch.nn.Sequential(module)
    assert parent.state_dict() == {} and parent.load_state_dict({})
    assert torch.equal(parent[0](student, teacher), expected)


def test_loads_with_weights_only() -> None:
    """A module that holds one, where the file may run no code."""
    student, teacher, _ = inputs((2,), 17)
    file = io.BytesIO()
    for divergence in ("tvd", fastkd.JSD(0.3), fastkd.divergences.TVD):
        holder = torch.nn.ModuleDict({"loss": fastkd.KDLoss(temperature=2.0, divergence=divergence)})
        file.seek(0)
        torch.save(holder, file)
        file.seek(0)
        with torch.serialization.safe_globals([torch.nn.ModuleDict]):
            loaded = torch.load(file, weights_only=True)
        assert torch.equal(loaded["loss"](student, teacher), holder["loss"](student, teacher))
        loaded["loss"].temperature = 3.0
        with pytest.raises(AttributeError):
            loaded["loss"].temprature = 3.0


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


def test_numbers_are_floats() -> None:
    """Of a module's numbers torch.compile lets only floats vary."""
    module = fastkd.KDLoss(temperature=2, hard_weight=1, soft_weight=1, label_smoothing=0)
    for name in ("temperature", "hard_weight", "soft_weight", "label_smoothing"):
        assert type(getattr(module, name)) is float
    module.hard_weight = None
    assert module.hard_weight is None


def test_an_attribute_is_the_keyword() -> None:
    """A schedule sets it."""
    student, teacher, _ = inputs((2,), 17)
    module = fastkd.KDLoss(temperature=2.0)
    module.temperature, module.divergence = 5.0, "reverse_kl"
    expected = fastkd.kd_loss(student, teacher, temperature=5.0, divergence="reverse_kl")
    assert torch.equal(module(student, teacher), expected)
