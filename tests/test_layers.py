"""Which layers, what they gave, and a student that starts as a copy."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastkd


class TestLayerMap:
    def test_uniform(self) -> None:
        assert fastkd.layer_map(6, 12) == [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]
        assert fastkd.layer_map(1, 12) == [(1, 12)]
        assert fastkd.layer_map(3, 3) == [(1, 1), (2, 2), (3, 3)]

    def test_last_and_first(self) -> None:
        assert fastkd.layer_map(6, 12, "last") == [(6, 12)]
        assert fastkd.layer_map(12, 6, "last") == [(12, 6)]
        assert fastkd.layer_map(6, 12, "first") == [(1, 1)]

    def test_sizes_that_do_not_divide(self) -> None:
        """Every layer of the student, the teacher's strictly increasing, the last pair the last layers."""
        for teacher in range(1, 40):
            for student in range(1, teacher + 1):
                pairs = fastkd.layer_map(student, teacher)
                assert [i for i, _ in pairs] == list(range(1, student + 1))
                assert all(j < k for (_, j), (_, k) in pairwise(pairs))
                assert pairs[0][1] >= 1 and pairs[-1] == (student, teacher)
                assert all(abs(j - i * teacher / student) <= 0.5 for i, j in pairs)

    def test_explicit(self) -> None:
        assert fastkd.layer_map(3, 5, [[0, 0], (1, 2), (3, 5)]) == [(0, 0), (1, 2), (3, 5)]  # type: ignore[list-item]

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ((0, 12), ValueError, "student_layers: got 0, must be >= 1"),
            ((6, 12.0), TypeError, "teacher_layers: got float, must be an int"),
            ((6, 12, "even"), ValueError, "strategy: got 'even', must be one of 'uniform', 'last', 'first'"),
            ((12, 6), ValueError, "student_layers: got 12, must be at most teacher_layers, 6, for 'uniform'"),
            ((6, 12, 3), TypeError, "strategy: got int, must be a sequence of pairs"),
            ((6, 12, []), ValueError, "strategy: got no pair"),
            ((6, 12, [1, 2]), TypeError, "strategy: got 1, must be pairs of ints"),
            ((6, 12, [(1, 2, 3)]), TypeError, "strategy: got (1, 2, 3), must be pairs of ints"),
            ((6, 12, [(1, True)]), TypeError, "strategy: got (1, True), must be pairs of ints"),
            ((6, 12, [(7, 12)]), ValueError, "strategy: got layer 7 of the student in (7, 12), must be in [0, 6]"),
            ((6, 12, [(6, 13)]), ValueError, "strategy: got layer 13 of the teacher in (6, 13), must be in [0, 12]"),
            ((6, 12, [(-1, 2)]), ValueError, "strategy: got layer -1 of the student in (-1, 2), must be in [0, 6]"),
            ((6, 12, [(1, 2), (1, 4)]), ValueError, "strategy: got (1, 4) after (1, 2), must be in the order"),
            ((6, 12, [(1, 4), (2, 2)]), ValueError, "strategy: got (2, 2) after (1, 4), must be in the order"),
        ],
        ids=lambda value: value[:30] if isinstance(value, str) else "",
    )
    def test_bad_argument(self, arguments: tuple[Any, ...], kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match="^" + re.escape(message)):
            fastkd.layer_map(*arguments)


class Layer(nn.Module):
    """Gives a tuple, as those of Hugging Face do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.tanh(self.linear(x)), None


class Model(nn.Module):
    """Returns no hidden states, and can checkpoint its layers."""

    def __init__(self, layers: int = 3, width: int = 4, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, 11)
        self.reentrant = reentrant

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden_states(ids)[-1])

    def hidden_states(self, ids: Tensor) -> list[Tensor]:
        states = [self.embed(ids)]
        for layer in self.layers:
            if self.reentrant is None:
                states.append(layer(states[-1])[0])
            else:
                states.append(checkpoint(layer, states[-1], use_reentrant=self.reentrant)[0])
        return states


IDS = torch.arange(10).view(2, 5)
NAMES = ("embed", "layers.0", "layers.2")


def expected_states(model: Model) -> list[Tensor]:
    return [model.hidden_states(IDS)[index] for index in (0, 1, 3)]


@pytest.fixture(autouse=True)
def on_a_cpu() -> Iterator[None]:
    with torch.device("cpu"):
        yield


class TestCapture:
    def test_what_the_modules_return(self) -> None:
        model = Model()
        with fastkd.capture(model, NAMES) as hidden:
            model(IDS)
            taken = hidden.take()
        assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(taken, expected_states(model), strict=True))
        assert not any(module._forward_hooks for module in model.modules())

    def test_their_gradient_is_the_models(self) -> None:
        model = Model()
        with fastkd.capture(model, ["layers.1"]) as hidden:
            model(IDS)
            hidden.take()[0].square().sum().backward()
        grad, model.embed.weight.grad = model.embed.weight.grad, None
        model.hidden_states(IDS)[2].square().sum().backward()
        assert torch.equal(grad, model.embed.weight.grad)

    def test_step_after_step(self) -> None:
        """One object for the whole training; each take is the last pass's."""
        model = Model()
        hidden = fastkd.capture(model, NAMES)
        for step in range(3):
            with torch.no_grad():
                model.embed.weight.fill_(float(step))
            model(IDS)
            assert all(torch.equal(a, b) for a, b in zip(hidden.take(), expected_states(model), strict=True))
            model(IDS)
        hidden.close()
        model(IDS)
        with pytest.raises(
            RuntimeError, match=r"nothing came from 'embed', 'layers.0', 'layers.2' since the last take"
        ):
            hidden.take()

    def test_nothing_twice(self) -> None:
        model = Model()
        hidden = fastkd.capture(model, NAMES)
        model(IDS)
        hidden.take()
        with pytest.raises(RuntimeError, match="the model has not run"):
            hidden.take()

    @pytest.mark.parametrize("how", ["taken", "left"])
    def test_nothing_is_kept(self, how: str) -> None:
        model = Model()
        with fastkd.capture(model, NAMES) as hidden:
            loss = model(IDS).sum()
            taken = hidden.take()
            references = [weakref.ref(tensor) for tensor in taken]
            loss.backward()
            if how == "left":
                loss = model(IDS).sum()
                references += [weakref.ref(tensor) for tensor in hidden._outputs.values()]
            del taken, loss
            if how == "taken":
                gc.collect()
                assert not any(reference() is not None for reference in references)
        gc.collect()
        assert not any(reference() is not None for reference in references)

    def test_detach(self) -> None:
        model = Model()
        with fastkd.capture(model, NAMES, detach=True) as hidden:
            model(IDS)
            assert not any(tensor.requires_grad for tensor in hidden.take())

    def test_outputs_of_other_kinds(self) -> None:
        class Mapping(nn.Module):
            def forward(self, x: Tensor) -> dict[str, Any]:
                return {"flag": True, "hidden": x + 1.0, "other": x}

        class Nothing(nn.Module):
            def forward(self, x: Tensor) -> str:
                return "nothing"

        model = nn.ModuleDict({"mapping": Mapping(), "nothing": Nothing()})
        with fastkd.capture(model, ["mapping"]) as hidden:
            model["mapping"](torch.zeros(2))
            assert torch.equal(hidden.take()[0], torch.ones(2))
        with fastkd.capture(model, ["nothing"]), pytest.raises(TypeError, match="'nothing' returned str, must be a te"):
            model["nothing"](torch.zeros(2))

    def test_unknown_name(self) -> None:
        model = Model()
        message = "names: got 'layer.2', which Model does not have; close are 'layers.2'"
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            fastkd.capture(model, ["embed", "layer.2"])
        assert not any(module._forward_hooks for module in model.modules())
        with pytest.raises(ValueError, match=r"got 'zzz', which Model does not have; see model\.named_modules"):
            fastkd.capture(model, ["zzz"])
        with pytest.raises(TypeError, match="names: got 'embed', must be a sequence of names"):
            fastkd.capture(model, "embed")
        with pytest.raises(TypeError, match="names: got 0, must be the name of a submodule"):
            fastkd.capture(model, [0])  # type: ignore[list-item]
        with pytest.raises(ValueError, match="names: got none, must be at least one name"):
            fastkd.capture(model, [])

    def test_names_that_can_be_read_once(self) -> None:
        model = Model()
        with fastkd.capture(model, iter(NAMES)) as hidden:
            model(IDS)
            assert [state.shape for state in hidden.take()] == [state.shape for state in expected_states(model)]

    def test_checkpointing(self) -> None:
        """What is computed again in backward is not collected again, and the gradients are those without."""
        grads = []
        for reentrant in (None, False):
            torch.manual_seed(0)
            model = Model(reentrant=reentrant)
            hidden = fastkd.capture(model, NAMES)
            out = model(IDS)
            (out.square().sum() + sum(tensor.square().sum() for tensor in hidden.take())).backward()
            with pytest.raises(RuntimeError, match="nothing came from"):
                hidden.take()
            grads.append([parameter.grad for parameter in model.parameters()])
        for plain, checkpointed in zip(*grads, strict=True):
            torch.testing.assert_close(plain, checkpointed)

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
    def test_reentrant_checkpointing_is_refused(self) -> None:
        """Its layers run without a graph: a loss on what they return would teach nothing, in silence."""
        model = Model(reentrant=True)
        with (
            fastkd.capture(model, ["layers.1"]),
            pytest.raises(RuntimeError, match=r"'layers.1' runs without a graph .*use_reentrant=False"),
        ):
            model(IDS)
        with fastkd.capture(model, ["layers.1"]) as hidden, torch.no_grad():  # evaluation
            model(IDS)
            hidden.take()

    @pytest.mark.parametrize("wrapper", ["compiled", "layers"])
    def test_wrapped(self, wrapper: str) -> None:
        """The model's own names, whatever wraps it or its layers."""
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        model = Model()
        wrapped: Any = torch.compile(model, backend="eager") if wrapper == "compiled" else model
        if wrapper == "layers":
            for index, layer in enumerate(model.layers):
                model.layers[index] = checkpoint_wrapper(layer)
        with fastkd.capture(wrapped, NAMES) as hidden:
            wrapped(IDS)
            assert all(torch.equal(a, b) for a, b in zip(hidden.take(), expected_states(model), strict=True))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
    def test_ddp(self, tmp_path: Path) -> None:
        """Collected within it, hidden states have gradients that it averages."""
        from torch import distributed

        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            model = Model()
            wrapped = nn.parallel.DistributedDataParallel(model)
            hidden = fastkd.capture(wrapped, NAMES)
            for _ in range(2):
                out = wrapped(IDS)
                taken = hidden.take()
                assert all(torch.equal(a, b) for a, b in zip(taken, expected_states(model), strict=True))
                model.zero_grad()
                (out.sum() + taken[2].square().sum()).backward()
                assert model.embed.weight.grad.any()
        finally:
            distributed.destroy_process_group()

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    @pytest.mark.parametrize("fullgraph", [True, False])
    def test_compile(self, fullgraph: bool) -> None:
        """Made before the model compiles, it collects in every step, with a gradient."""
        torch.compiler.reset()
        model = Model()
        hidden = fastkd.capture(model, NAMES)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        for step in range(3):
            with torch.no_grad():
                model.embed.weight.mul_(step + 1.0)
            compiled(IDS)
            taken = hidden.take()
            for a, b in zip(taken, expected_states(model), strict=True):
                torch.testing.assert_close(a, b)
            model.zero_grad()
            taken[2].square().sum().backward()
            grad = model.embed.weight.grad.clone()
            model.zero_grad()
            model.hidden_states(IDS)[3].square().sum().backward()
            torch.testing.assert_close(grad, model.embed.weight.grad)
        hidden.close()
        torch.compiler.reset()


def linears(count: int, width: int = 4) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


class TestCopyLayers:
    def test_layers_embeddings_and_head(self) -> None:
        teacher, student = Model(12), Model(6)
        untouched = [parameter.clone() for parameter in teacher.parameters()]
        pairs = fastkd.layer_map(6, 12)
        report = fastkd.copy_layers(teacher, student, pairs, teacher_layers="layers")
        for i, j in pairs:
            for mine, its in zip(student.layers[i - 1].parameters(), teacher.layers[j - 1].parameters(), strict=True):
                assert torch.equal(mine, its) and mine is not its and mine.requires_grad
        assert torch.equal(student.embed.weight, teacher.embed.weight)
        assert torch.equal(student.head.bias, teacher.head.bias)
        assert all(torch.equal(a, b) for a, b in zip(untouched, teacher.parameters(), strict=True))
        assert report.copied["layers.0.linear.weight"] == "layers.1.linear.weight"
        assert set(report.copied) == {name for name, _ in student.named_parameters()}
        assert report.skipped == {f"layers.{index} of the teacher": "in no pair" for index in range(0, 12, 2)}

    def test_another_width(self) -> None:
        """Nothing fits but what is said to, and all is said."""
        teacher, student = Model(4, width=8), Model(2, width=4)
        before = [parameter.clone() for parameter in student.parameters()]
        report = fastkd.copy_layers(teacher, student, fastkd.layer_map(2, 4), teacher_layers="layers")
        assert list(report.copied) == ["head.bias"]
        assert report.skipped["head.weight"] == "(11, 4) in the student, (11, 8) in the teacher's head.weight"
        assert "(4, 4) in the student, (8, 8) in the teacher's layers.1" in report.skipped["layers.0.linear.weight"]
        assert all(
            torch.equal(a, b) or name == "head.bias"
            for (name, a), b in zip(student.named_parameters(), before, strict=True)
        )
        assert {name for name, _ in student.named_parameters()} <= set(report.copied) | set(report.skipped)

    def test_buffers_and_strangers(self) -> None:
        """A buffer is copied; what one of the two lacks is reported, and so is a layer in no pair."""
        teacher, student = (nn.ModuleDict({"layers": linears(count)}) for count in (3, 2))
        for model, value in ((teacher, 1.0), (student, 0.0)):
            model.register_buffer("positions", torch.full((3,), value))
            model["layers"].get_submodule("1").register_buffer("scale", torch.full((2,), value))
        teacher["pooler"], student["adapter"] = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        report = fastkd.copy_layers(teacher, student, [(2, 2)], teacher_layers="layers", student_layers="layers")
        assert student.positions.sum() == 3 and student["layers"][1].scale.sum() == 2
        assert report.skipped == {
            "layers.0 of the student": "in no pair",
            "adapter.weight": "the teacher has no adapter.weight",
            "layers.0 of the teacher": "in no pair",
            "layers.2 of the teacher": "in no pair",
            "pooler.weight of the teacher": "nothing in the student takes it",
        }
        for name, why in report.skipped.items():
            assert f"\n  {name}: {why}" in str(report)
        assert "\n  layers.1.scale <- layers.1.scale" in str(report)
        assert str(report).startswith(f"{len(report.copied)} tensors copied, 5 tensors or layers not:")

    def test_layers_by_another_name_and_dtype(self) -> None:
        teacher = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": linears(4)})})
        student = nn.ModuleDict({"layers": linears(2)}).to(torch.bfloat16)
        names = {"teacher_layers": "encoder.layer", "student_layers": "layers"}
        report = fastkd.copy_layers(teacher, student, [(1, 1), (2, 4)], **names)
        assert report.copied["layers.1.weight"] == "encoder.layer.3.weight"
        assert torch.equal(student["layers"][1].weight, teacher["encoder"]["layer"][3].weight.bfloat16())

    def test_tied_weights(self) -> None:
        """A tensor of two names is copied once."""
        teacher, student = Model(2), Model(1)
        for model in (teacher, student):
            model.head.weight = model.embed.weight
        report = fastkd.copy_layers(teacher, student, [(1, 2)], teacher_layers="layers")
        assert torch.equal(student.head.weight, teacher.embed.weight) and student.head.weight is student.embed.weight
        assert "embed.weight" in report.copied and not [name for name in report.skipped if "weight" in name]
        student.head.weight = nn.Parameter(torch.zeros(11, 4))
        report = fastkd.copy_layers(teacher, student, [(1, 2)], teacher_layers="layers")
        assert report.copied["head.weight"] == "head.weight"
        assert torch.equal(student.head.weight, teacher.embed.weight)

    def test_wrapped(self) -> None:
        teacher, student = Model(4), Model(2)
        wrapped = torch.compile(teacher, backend="eager")
        report = fastkd.copy_layers(wrapped, student, fastkd.layer_map(2, 4), teacher_layers="layers")  # type: ignore[arg-type]
        assert report.copied["layers.1.linear.bias"] == "layers.3.linear.bias" and "embed.weight" in report.copied
        # By the names that the layers have in the wrapper, too.
        module = nn.ModuleDict({"module": student})
        names = {"teacher_layers": "_orig_mod.layers", "student_layers": "module.layers"}
        assert str(fastkd.copy_layers(wrapped, module, fastkd.layer_map(2, 4), **names)) == str(report)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("call", "kind", "message"),
        [
            (lambda t, s: fastkd.copy_layers(t, s, [(1, 2)], teacher_layers="layer"), ValueError,
             "teacher_layers: got 'layer', which Model does not have; close are 'layers'"),
            (lambda t, s: fastkd.copy_layers(t, s, [(1, 2)], teacher_layers=None), TypeError,
             "teacher_layers: got None, must be the name of a submodule"),
            (lambda t, s: fastkd.copy_layers(t, s, [(1, 2)], teacher_layers="layers", student_layers="head"), TypeError,
             "student_layers: 'head' is a Linear, must be a ModuleList or Sequential"),
            (lambda t, s: fastkd.copy_layers(t, s, [(1, 5)], teacher_layers="layers"), ValueError,
             "pairs: got layer 5 of the teacher in (1, 5), must be in [1, 4]"),
            (lambda t, s: fastkd.copy_layers(t, s, [(0, 0)], teacher_layers="layers"), ValueError,
             "pairs: got layer 0 of the student in (0, 0), must be in [1, 2]"),
        ],
        ids=["name", "no name", "no list", "beyond", "embeddings"],
    )  # fmt: skip
    def test_bad_argument(self, call: Callable[..., Any], kind: type[Exception], message: str) -> None:
        teacher, student = Model(4), Model(2)
        before = [parameter.clone() for parameter in student.parameters()]
        with pytest.raises(kind, match="^" + re.escape(message)):
            call(teacher, student)
        assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
