"""Hugging Face Transformers: a ``Trainer`` that distils from hidden states, and a loss for ``Trainer`` itself."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from fastkd import HiddenLoss, KDLoss, LinearLogits, TopK

if TYPE_CHECKING:
    from fastkd import Divergence

IGNORED = -100  # the label that does not count, in all of Transformers
# What a model's config calls the factor of its logits.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")


@dataclass(kw_only=True)
class KDConfig:
    """Keywords of :func:`fastkd.kd_loss`, as a dataclass that ``transformers.HfArgumentParser`` reads.

    ``hard_weight`` has no default: how much cross-entropy there is, is said. ``vocab_size`` is needed where the models'
    heads are padded to different heights: the tokenizer's. ``hidden_weight`` is of a :class:`fastkd.HiddenLoss`.

    ``whole_logits``: take the models' own logits, ``(batch, length, V)`` in memory, instead of hidden states and the
    heads' matrices; for models whose head is not one linear layer, or is sharded by FSDP1 or ZeRO-3.
    """

    hard_weight: float
    soft_weight: float = 1.0
    temperature: float = 1.0
    if TYPE_CHECKING:
        divergence: str | Divergence = "forward_kl"
    else:  # of a union HfArgumentParser would read the other type; a Divergence is welcome here too
        divergence: str = "forward_kl"
    scale_soft_by_t2: bool = True
    label_smoothing: float = 0.0
    z_loss_weight: float = 0.0
    vocab_size: int | None = None
    chunk_rows: int | None = None
    backend: str | None = None
    hidden_weight: float = 1.0
    whole_logits: bool = False

    def loss_fn(self) -> KDLoss:
        """Raises as :class:`fastkd.KDLoss` does."""
        own = ("hidden_weight", "whole_logits")
        return KDLoss(**{field.name: getattr(self, field.name) for field in fields(self) if field.name not in own})


def linear_logits(model: Any, hidden: Tensor) -> LinearLogits:
    """The logits that a model with a linear head would give for what goes into it, scale and soft cap included.

    Args:
        model: one of Transformers', unwrapped, with ``get_output_embeddings()`` and a ``config``.
        hidden: ``(..., H)``, the last hidden state.

    Raises:
        TypeError: the head is not ``nn.Linear``.
        ValueError: the head's matrix is not all here (FSDP1, ZeRO-3).
    """
    head, config = _head(model), model.config.get_text_config()
    weight, bias = (
        # An FSDP2 shard is of the dtype that it is trained in.
        parameter.full_tensor().to(hidden.dtype) if isinstance(parameter, DTensor) else parameter
        for parameter in (head.weight, head.bias)
    )
    if weight.shape != (head.out_features, head.in_features):
        raise ValueError(
            f"model: got a head of {tuple(weight.shape)}, must be ({head.out_features}, {head.in_features}): it is "
            "sharded outside the model's forward; give KDConfig(whole_logits=True)"
        )
    scale = next((value for name in _SCALES if (value := getattr(config, name, None)) is not None), 1.0)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    return LinearLogits(hidden, weight, bias, scale, getattr(config, "final_logit_softcapping", None))


class kd_loss_func:
    """The loss for ``Trainer(compute_loss_func=...)``: what a :class:`KDTrainer` minimises, without being one.

    It runs the teacher on what the student was called with. The Trainer has the student's logits computed, and they are
    used; those of the teacher are never all there. Labels are needed, and shifted if the student's own loss shifts
    them; those that are -100 count for neither term. The loss is the sum over the others divided by the Trainer's
    ``num_items_in_batch``, the number of them in all micro-batches and on all devices.

    Args:
        student: the Trainer's model, not yet wrapped. A hook on it sees its arguments.
        teacher: a model that takes the same; in ``eval()`` from here on, and on the student's device.
        config: weights, temperature and so on.
        hidden_loss: also match hidden states, of the tokens whose labels count, with weight ``config.hidden_weight``.
            Where it has projections, have it within the student (``student.projections = hidden_loss``), which the
            optimizer, checkpoints and the averaging of gradients then cover.

    Attributes:
        parts: of the last call, the terms' unweighted means over the ``count`` tokens that count, detached.

    Raises:
        ValueError, TypeError: a bad argument; when called: no labels, or what :func:`fastkd.kd_loss` refuses.
    """

    def __init__(
        self, student: Any, teacher: Any | None, config: KDConfig, *, hidden_loss: HiddenLoss | None = None
    ) -> None:
        self.teacher, self.hidden_loss, self.hidden_weight = teacher, hidden_loss, config.hidden_weight
        self.loss_fn = config.loss_fn()
        own = {id(parameter) for parameter in student.parameters()}
        if hidden_loss is not None and any(id(parameter) not in own for parameter in hidden_loss.parameters()):
            raise ValueError(
                "hidden_loss: got projections that are no part of the student, where nothing would train or save them; "
                "have student.projections = hidden_loss"
            )
        loss_type = LOSS_MAPPING.get(getattr(_base(student), "loss_type", None))
        self.shifts = loss_type is ForCausalLMLoss and not student.config.is_encoder_decoder
        self.parts: dict[str, Tensor] = {}
        self.count = torch.tensor(0)
        self._inputs: dict[str, Any] = {}
        self._teacher_inputs: dict[str, Any] = {"output_hidden_states": True} if hidden_loss is not None else {}
        self._teacher_head = None
        if teacher is not None:
            teacher.eval()
            if "use_cache" in inspect.signature(_base(teacher).forward).parameters:
                self._teacher_inputs["use_cache"] = False
            self._teacher_head = None if config.whole_logits else _Head(teacher)
        student.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Keep what the student is called with, and have it return hidden states where they are needed."""
        self._inputs = {name: value for name, value in kwargs.items() if name not in ("labels", "num_items_in_batch")}
        return args, kwargs if self.hidden_loss is None else {**kwargs, "output_hidden_states": True}

    def __call__(
        self,
        outputs: Any,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        student_logits: LinearLogits | None = None,
        teacher_logits: TopK | None = None,
    ) -> Tensor:
        """``student_logits`` instead of those in the outputs, and ``teacher_logits`` instead of the teacher's."""
        if labels is None:
            raise ValueError(f"labels: got None, must say which rows count (the others are {IGNORED})")
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.reshape(())
        inputs, self._inputs = self._inputs, {}
        if not inputs:
            raise RuntimeError("kd_loss_func: the student that it was made for has not run")
        if self.shifts:
            labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
        counts = labels != IGNORED
        self.count = counts.sum()
        teacher, states = (teacher_logits, None) if teacher_logits is not None else self._run_teacher(inputs)
        # A term of weight 0 would be computed for its part alone: in evaluation it is.
        two = bool(self.loss_fn.hard_weight and self.loss_fn.soft_weight) or not torch.is_grad_enabled()
        self.loss_fn.return_parts = two
        student = outputs.logits if student_logits is None else student_logits
        result: Any = self.loss_fn(student, teacher, labels, num_items=num_items_in_batch)
        loss, self.parts = result, {}
        if two:
            loss, self.parts["hard_loss"], self.parts["soft_loss"] = result
        if self.hidden_loss is not None:
            if states is None:
                raise ValueError("hidden_loss: a teacher that is a TopK has no hidden states")
            hidden = self.hidden_loss(outputs.hidden_states, states, mask=counts)
            # Of a step without labels both are 0.
            share = 1.0 if num_items_in_batch is None else self.count / torch.as_tensor(num_items_in_batch).clamp(min=1)
            loss = loss + hidden * (self.hidden_weight * share)
            self.parts["hidden_loss"] = hidden.detach()
        return loss  # type: ignore[no-any-return]

    @torch.no_grad()
    def _run_teacher(self, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """Its logits, or what they come from, and its hidden states if they are needed."""
        if self.teacher is None:
            raise ValueError("teacher: got None, and the batch brings none either")
        with self._teacher_head or nullcontext():
            outputs = self.teacher(**inputs, **self._teacher_inputs)
        logits = outputs.logits if self._teacher_head is None else self._teacher_head.logits(outputs)
        return logits, outputs.hidden_states


class KDTrainer(Trainer):
    """``Trainer`` whose loss is :func:`fastkd.kd_loss` of hidden states: the logits of neither model are ever there.

    Right under gradient accumulation, data parallelism, autocast, gradient checkpointing and in evaluation, where
    ``compute_metrics`` gets the student's whole logits and nothing else computes them. Logs ``hard_loss`` and
    ``soft_loss``, unweighted means over the tokens that count (while training only if both have a weight),
    ``hidden_loss`` where there is one, and ``eval_hard_loss`` and so on. What is said of :class:`kd_loss_func` about
    labels holds.

    Args:
        model: the student.
        args: ``TrainingArguments``.
        teacher: a model, or None: then every batch brings the teacher's :class:`fastkd.TopK` as ``"teacher"``, as
            those of a cache do: ``train_dataset=cached, data_collator=cached.collate`` of a
            :class:`fastkd.cache.CachedDataset`.
        kd_config: :class:`KDConfig`.
        hidden_loss: as for :class:`kd_loss_func`.
        **kwargs: of ``Trainer``.

    Raises:
        ValueError: ``label_smoothing_factor`` in ``args`` (it is ``KDConfig.label_smoothing`` here); more than one GPU
            in this process (``DataParallel``: use ``torchrun``); and what :class:`kd_loss_func` raises.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        teacher: Any | None = None,
        kd_config: KDConfig,
        hidden_loss: HiddenLoss | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, compute_loss_func=self._kd_loss, **kwargs)
        if self.args.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor: got {self.args.label_smoothing_factor}, must be 0; it is "
                "KDConfig(label_smoothing=...) here"
            )
        if self.args.n_gpu > 1:
            raise ValueError(f"args: got {self.args.n_gpu} GPUs in one process, must be 1: start it with torchrun")
        self.kd = kd_loss_func(model, teacher, kd_config, hidden_loss=hidden_loss)
        if teacher is not None:
            self.kd.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        self._head = None if kd_config.whole_logits else _Head(model)
        self._metrics = False  # which need whole logits
        self._topk: TopK | None = None
        self._totals: dict[str, Tensor] = {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._totals = {}  # of the steps after the last log of another run
        return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        # The base class calls `compute_loss_func`, and scales the loss for the averages over devices.
        inputs = dict(inputs)
        self._topk = inputs.pop("teacher", None)
        with self._head if self._head is not None and not self._metrics else nullcontext():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _kd_loss(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = None if self._head is None or self._metrics else self._head.logits(outputs)
        topk, self._topk = self._topk, None
        loss = self.kd(outputs, labels, num_items_in_batch, student_logits=logits, teacher_logits=topk)
        for name, part in self.kd.parts.items():
            total = torch.stack([part * self.kd.count, self.kd.count.to(part.dtype)])
            self._totals[name] = self._totals[name] + total if name in self._totals else total
        return loss

    def _means(self) -> dict[str, float]:
        """Of the parts since the last call, over all devices."""
        totals, self._totals = self._totals, {}
        sums = {name: self.accelerator.gather(total).view(-1, 2).sum(0) for name, total in totals.items()}
        return {name: (total[0] / total[1].clamp(min=1)).item() for name, total in sums.items()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, **self._means()} if "loss" in logs else logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        training, self._totals = self._totals, {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in self._means().items()})
        self._totals = training
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        self._metrics = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._metrics = False

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, TopK):  # which the base class would rebuild as a plain tuple
            return data._replace(ids=data.ids.to(self.args.device), log_probs=data.log_probs.to(self.args.device))
        return super()._prepare_input(data)


class _Head:
    """A model's head, which within a ``with`` computes no logits: it sees one position, and what came to it is kept.

    The logits of that one are compared, once, with what is computed in their stead.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.active, self.checked, self.hidden = model, False, False, None
        _head(model).register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.active:
            return None
        self.hidden = args[0]
        return (args[0][:, :1], *args[1:])

    def __enter__(self) -> None:
        self.active, self.hidden = True, None

    def __exit__(self, *error: object) -> None:
        self.active = False

    def logits(self, outputs: Any) -> LinearLogits:
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            raise RuntimeError(f"{type(self.model).__name__}: its head has not run; give KDConfig(whole_logits=True)")
        logits = linear_logits(self.model, hidden)
        if not self.checked:
            self._check(logits, outputs.logits)
            self.checked = True
        return logits

    @torch.no_grad()
    def _check(self, logits: LinearLogits, expected: Tensor) -> None:
        x = logits.scale * F.linear(logits.hidden[:, :1], logits.weight, logits.bias).float()
        x = x if logits.softcap is None else logits.softcap * torch.tanh(x / logits.softcap)
        error, size = (x - expected.float()).abs().max().item(), expected.abs().max().item()
        if error > 2e-2 * size + 1e-6:
            raise ValueError(
                f"{type(self.model).__name__}: its logits are not those of its head with the scale and the soft cap in "
                f"its config (off by {error:.1e} of {size:.1e}); give KDConfig(whole_logits=True)"
            )


def _head(model: Any) -> nn.Linear:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"{type(model).__name__}: got the head {type(head)}, must be nn.Linear; give KDConfig(whole_logits=True)"
        )
    return head


def _base(model: Any) -> Any:
    """Without an adapter of PEFT's around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
