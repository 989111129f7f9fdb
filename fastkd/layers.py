"""Which layers of a teacher a student learns from, what they gave, and a student that starts as a copy of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import _validate

Pairs = Sequence[tuple[int, int]]

# What wrappers put into the names of a model's modules: DDP, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def layer_map(student_layers: int, teacher_layers: int, strategy: str | Pairs = "uniform") -> list[tuple[int, int]]:
    """Which of the teacher's layers each of the student's is to match: pairs (student's, teacher's).

    Layers are counted as in ``hidden_states[i]`` of Hugging Face models: from 1, and 0 is what the embeddings give.

    Args:
        student_layers: how many layers the student has.
        teacher_layers: how many the teacher has.
        strategy: ``"uniform"``: every layer of the student, spread evenly, 6 of 12 being (1, 2), (2, 4), …, (6, 12);
            rounded where the numbers do not divide, so that teacher's layers increase and the last pair is that of the
            last layers. ``"last"`` or ``"first"``: that pair alone. Or the pairs themselves, which are checked: within
            the models (0 included), the student's increasing, the teacher's not decreasing.

    Raises:
        ValueError, TypeError: a number of layers, a strategy or a pair that makes no sense.

    Example:
        >>> import fastkd
        >>> fastkd.layer_map(6, 12)
        [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]
        >>> fastkd.layer_map(4, 6)
        [(1, 2), (2, 3), (3, 5), (4, 6)]
    """
    for name, layers in (("student_layers", student_layers), ("teacher_layers", teacher_layers)):
        _validate.check_int(name, layers)
        if layers < 1:
            raise ValueError(f"{name}: got {layers}, must be >= 1")
    if not isinstance(strategy, str):
        return check_pairs("strategy", strategy, student_layers, teacher_layers)
    _validate.check_one_of("strategy", strategy, ("uniform", "last", "first"))
    if strategy == "last":
        return [(student_layers, teacher_layers)]
    if strategy == "first":
        return [(1, 1)]
    if student_layers > teacher_layers:
        raise ValueError(
            f"student_layers: got {student_layers}, must be at most teacher_layers, {teacher_layers}, for 'uniform'"
        )
    return [
        (i, (2 * i * teacher_layers + student_layers) // (2 * student_layers)) for i in range(1, student_layers + 1)
    ]


def check_pairs(
    name: str, pairs: Any, student_layers: int | None = None, teacher_layers: int | None = None, first: int = 0
) -> list[tuple[int, int]]:
    """The pairs as a list; each is two ints from ``first`` on, in order, up to the layers that there are."""
    if not isinstance(pairs, Sequence):
        raise TypeError(f"{name}: got {type(pairs).__name__}, must be a sequence of pairs: student's layer, teacher's")
    checked: list[tuple[int, int]] = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(type(index) is int for index in pair):
            raise TypeError(f"{name}: got {pair!r}, must be pairs of ints: student's layer, teacher's layer")
        for index, layers, whose in zip(pair, (student_layers, teacher_layers), ("student", "teacher"), strict=True):
            if index < first or (layers is not None and index > layers):
                allowed = f">= {first}" if layers is None else f"in [{first}, {layers}]"
                raise ValueError(f"{name}: got layer {index} of the {whose} in {tuple(pair)}, must be {allowed}")
        if checked and not (pair[0] > checked[-1][0] and pair[1] >= checked[-1][1]):
            raise ValueError(f"{name}: got {tuple(pair)} after {checked[-1]}, must be in the order of the layers")
        checked.append((pair[0], pair[1]))
    if not checked:
        raise ValueError(f"{name}: got no pair, must be at least one")
    return checked


class capture:
    """Collect what named submodules return, for models that do not return their hidden states.

    Made once, before ``torch.compile`` or the first step, it collects in every forward pass until it is closed; or it
    is a context manager for a block. :meth:`take` hands over what the last forward pass left, and forgets it.

    A module that returns a tuple or a mapping counts by the first tensor in it. One that runs several times between two
    takes counts by the last time, and what checkpointing computes again in backward does not count. Names are those of
    the model itself, whatever wraps it or its parts (DDP, FSDP, ``torch.compile``, ``checkpoint_wrapper``).

    Args:
        model: any module.
        names: of its submodules, as ``model.named_modules()`` has them.
        detach: hand over tensors without their graph: a teacher's that does not run under ``torch.no_grad()``.

    Raises:
        ValueError: a name that the model does not have; the message lists close ones. Or no name.
        TypeError: names that are none; or, when it runs, a module that returns no tensor.
        RuntimeError: from :meth:`take`, a module that has not run since the last one, be it that compiled code was made
            before the hooks; or, when it runs, a module under reentrant checkpointing, whose output has no gradient
            (``use_reentrant=False`` has).

    Example:
        >>> import torch, fastkd
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> with fastkd.capture(model, ["0", "1"]) as hidden:
        ...     out = model(torch.zeros(5, 2))
        ...     [tensor.shape for tensor in hidden.take()]
        [torch.Size([5, 3]), torch.Size([5, 3])]
    """

    def __init__(self, model: nn.Module, names: Iterable[str], *, detach: bool = False) -> None:
        if not isinstance(names, Iterable) or isinstance(names, str):
            raise TypeError(f"names: got {names!r}, must be a sequence of names of submodules")
        self._names = tuple(names)  # an iterator can be read once
        if not self._names:
            raise ValueError("names: got none, must be at least one name of a submodule")
        found = [_find(model, "names", name) for name in self._names]
        self._outputs: dict[str, Tensor] = {}
        self._detach = detach
        self._hooks = [
            module.register_forward_hook(self._hook(name)) for name, module in zip(self._names, found, strict=True)
        ]

    def take(self) -> tuple[Tensor, ...]:
        """What the modules returned, in the order of the names. It is then no longer kept here."""
        missing = [name for name in self._names if name not in self._outputs]
        if missing:
            raise RuntimeError(
                f"capture: nothing came from {', '.join(map(repr, missing))} since the last take(): the model has not "
                "run, or not these modules, or it was compiled before capture was made"
            )
        outputs = tuple(self._outputs[name] for name in self._names)
        self._outputs.clear()
        return outputs

    def close(self) -> None:
        """Remove the hooks, and forget what was not taken."""
        for hook in self._hooks:
            hook.remove()
        self._outputs.clear()

    def __enter__(self) -> capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hook(self, name: str) -> Any:
        outputs, detach = self._outputs, self._detach

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not torch.compiler.is_compiling() and _in_backward():
                return
            tensor = _first_tensor(output)
            if tensor is None:
                raise TypeError(f"capture: {name!r} returned {type(output).__name__}, must be a tensor or hold one")
            if not detach and not torch.is_grad_enabled() and any(_needs_gradient(x) for x in inputs):
                raise RuntimeError(
                    f"capture: {name!r} runs without a graph on inputs that have one, as in reentrant checkpointing; "
                    "its output would carry no gradient. Checkpoint with use_reentrant=False"
                )
            outputs[name] = tensor.detach() if detach else tensor

        return keep


@dataclass(frozen=True)
class CopyReport:
    """What :func:`copy_layers` did, by the names that the tensors have in the student, or the teacher if it lacks them.

    ``str()`` of it is the whole of it in lines.
    """

    copied: dict[str, str]  # the student's tensor -> the teacher's
    skipped: dict[str, str]  # a tensor, or a layer -> why

    def __str__(self) -> str:
        lines = [f"{len(self.copied)} tensors copied, {len(self.skipped)} tensors or layers not:"]
        lines += [f"  {student} <- {teacher}" for student, teacher in self.copied.items()]
        lines += [f"  {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


@torch.no_grad()
def copy_layers(
    teacher: nn.Module,
    student: nn.Module,
    pairs: Pairs,
    *,
    teacher_layers: str,
    student_layers: str | None = None,
) -> CopyReport:
    """Start a student from its teacher: copy paired layers, and all outside the layers that has a namesake.

    Parameters and buffers are copied where name and shape agree (dtype and device may differ), embeddings and head
    among them; the report says of everything else why it was not.

    Args:
        teacher: the model to copy from.
        student: the model to copy into, in place.
        pairs: (student's layer, teacher's layer), counted from 1, as :func:`layer_map` gives them.
        teacher_layers: name of the teacher's layers, a ``ModuleList`` or ``Sequential`` (``"bert.encoder.layer"``).
        student_layers: of the student's; the teacher's name by default.

    Returns:
        A :class:`fastkd.CopyReport`; print it.

    Raises:
        ValueError, TypeError: a name that a model does not have (the message lists close ones), or that is no list of
            layers; pairs beyond the layers there are.

    Example:
        >>> import torch, fastkd
        >>> teacher, student = (
        ...     torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(count))) for count in (4, 2)
        ... )
        >>> print(fastkd.copy_layers(teacher, student, fastkd.layer_map(2, 4), teacher_layers=""))
        4 tensors copied, 2 tensors or layers not:
          0.weight <- 1.weight
          0.bias <- 1.bias
          1.weight <- 3.weight
          1.bias <- 3.bias
          0 of the teacher: in no pair
          2 of the teacher: in no pair
    """
    student_layers = teacher_layers if student_layers is None else student_layers
    teacher_list = _layers(teacher, "teacher_layers", teacher_layers)
    student_list = _layers(student, "student_layers", student_layers)
    checked = check_pairs("pairs", pairs, len(student_list), len(teacher_list), first=1)
    student_layers, teacher_layers = _own_name(student_layers), _own_name(teacher_layers)

    # The names of paired layers, the student's and what stands for it in the teacher. Elsewhere names are the same.
    renamed = {_dotted(student_layers, i - 1): _dotted(teacher_layers, j - 1) for i, j in checked}
    sources = dict(_tensors(teacher, tied=True))
    copied: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for name, target in _tensors(student):
        layer = _layer_of(name, student_layers)
        if layer is not None and layer not in renamed:
            skipped[f"{layer} of the student"] = "in no pair"
            continue
        of_teacher = name if layer is None else renamed[layer] + name.removeprefix(layer)
        source = sources.get(of_teacher)
        if source is None or (layer is None and _layer_of(of_teacher, teacher_layers)):
            skipped[name] = f"the teacher has no {of_teacher}"
        elif source.shape != target.shape:
            skipped[name] = f"{tuple(target.shape)} in the student, {tuple(source.shape)} in the teacher's {of_teacher}"
        else:
            target.copy_(source)
            copied[name] = of_teacher
    for name, _ in _tensors(teacher):
        layer = _layer_of(name, teacher_layers)
        if layer is not None and layer not in renamed.values():
            skipped[f"{layer} of the teacher"] = "in no pair"
        elif name not in copied.values():
            skipped[f"{name} of the teacher"] = "nothing in the student takes it"
    return CopyReport(copied, skipped)


def _tensors(model: nn.Module, tied: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by the model's own names; ``tied``: a shared one by each of them."""
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=not tied):
            yield _own_name(name), tensor


def _layers(model: nn.Module, argument: str, name: str) -> nn.ModuleList | nn.Sequential:
    found = _find(model, argument, name)
    if not isinstance(found, (nn.ModuleList, nn.Sequential)):
        raise TypeError(f"{argument}: {name!r} is a {type(found).__name__}, must be a ModuleList or Sequential")
    return found


def _layer_of(name: str, layers: str) -> str | None:
    """The name of the layer that a tensor belongs to, or None if it is outside ``layers``."""
    depth = layers.count(".") + 1 if layers else 0
    parts = name.split(".")
    return ".".join(parts[: depth + 1]) if ".".join(parts[:depth]) == layers else None


def _dotted(layers: str, index: int) -> str:
    return f"{layers}.{index}" if layers else str(index)


def _own_name(name: str) -> str:
    """Without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _find(model: nn.Module, argument: str, name: str) -> nn.Module:
    """The submodule of this name; with wrappers within the model, the outermost of it."""
    if not isinstance(name, str):
        raise TypeError(f"{argument}: got {name!r}, must be the name of a submodule")
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name in modules:
        return modules[name]
    own: dict[str, nn.Module] = {}
    for wrapped, module in modules.items():
        own.setdefault(_own_name(wrapped), module)
    if name in own:
        return own[name]
    close = difflib.get_close_matches(name, own, n=5, cutoff=0.5)
    hint = f"close are {', '.join(map(repr, close))}" if close else "see model.named_modules()"
    raise ValueError(f"{argument}: got {name!r}, which {type(model).__name__} does not have; {hint}")


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return next((item for item in output if isinstance(item, Tensor)), None)
    return None


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _in_backward() -> bool:
    """Checkpointing computes there again what forward gave. Private to PyTorch; without it, never."""
    return getattr(torch._C, "_current_graph_task_id", lambda: -1)() != -1
