"""The module form of the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, overload

from torch import Tensor, nn
from torch.serialization import add_safe_globals
from typing_extensions import TypeVar

from fastkd import _dispatch, _keywords, _slices, _validate
from fastkd._request import Formula
from fastkd.divergences import Divergence, resolve
from fastkd.functional import KDLossParts, Logits, NumItems, Settings, Teacher, kd_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

Result = TypeVar("Result", bound="Tensor | KDLossParts", default=Tensor)


class KDLoss(nn.Module, Generic[Result]):
    """:func:`fastkd.kd_loss` with its keywords as attributes, which a schedule may change from call to call.

    ``mask``, ``soft_mask``, ``token_weights`` and ``num_items`` come at each call.

    Raises:
        ValueError, TypeError: a bad argument, when the module is made, the attribute set or the loss computed.
        AttributeError: an attribute is set whose name is like a keyword's and none, or an argument's of the call.

    Example:
        >>> import torch, fastkd
        >>> loss_fn = fastkd.KDLoss(temperature=2.0, hard_weight=0.5, soft_weight=0.5)
        >>> logits = torch.zeros(2, 4)
        >>> loss_fn(logits, logits, torch.tensor([1, 3]))
        tensor(0.6931)
    """

    @overload
    def __init__(
        self: KDLoss[Tensor], *, return_parts: Literal[False] = False, **settings: Unpack[Settings]
    ) -> None: ...
    @overload
    def __init__(self: KDLoss[KDLossParts], *, return_parts: Literal[True], **settings: Unpack[Settings]) -> None: ...
    @overload
    def __init__(self: KDLoss[Tensor | KDLossParts], *, return_parts: bool, **settings: Unpack[Settings]) -> None: ...
    @_keywords.named_arguments
    def __init__(
        self,
        *,
        temperature: float = 1.0,
        hard_weight: float | None = None,
        soft_weight: float = 1.0,
        divergence: str | Divergence = "forward_kl",
        scale_soft_by_t2: bool = True,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        vocab_size: int | None = None,
        z_loss_weight: float = 0.0,
        inplace_backward: bool = False,
        return_parts: bool = False,
        chunk_rows: int | None = None,
        backend: str | None = None,
        vocab_group: ProcessGroup | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        if unknown:
            _keywords.check_keywords("KDLoss", KDLoss, unknown, _HINTS)
        self.temperature = temperature
        self.hard_weight = hard_weight
        self.soft_weight = soft_weight
        self.divergence = divergence
        self.scale_soft_by_t2 = scale_soft_by_t2
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.vocab_size = vocab_size
        self.z_loss_weight = z_loss_weight
        self.inplace_backward = inplace_backward
        self.return_parts = return_parts
        self.chunk_rows = chunk_rows
        self.backend = backend
        self.vocab_group = vocab_group

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHECKS:
            _CHECKS[name](value)
            if name in _FLOATS and value is not None:  # of a module's numbers torch.compile lets only floats vary
                value = float(value)
        elif not hasattr(self, name) and (hint := _keywords.meant(name, _CHECKS, _HINTS)):
            # Other names are free: frameworks keep things in modules.
            raise AttributeError(f"KDLoss: got an unknown attribute {name!r}; {hint}")
        super().__setattr__(name, value)

    def keywords(self) -> dict[str, Any]:
        """What :func:`fastkd.kd_loss` is called with at every call."""
        return {name: getattr(self, name) for name in _CHECKS}

    @_keywords.named_arguments
    def forward(
        self,
        student_logits: Logits,
        teacher_logits: Teacher,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        soft_mask: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: NumItems = None,
        **unknown: NoReturn,
    ) -> Result:
        if unknown:
            _keywords.check_keywords("KDLoss.forward", KDLoss.forward, unknown, _HINTS_OF_CALL)
        return kd_loss(  # type: ignore[no-any-return]
            student_logits,
            teacher_logits,
            labels,
            mask=mask,
            soft_mask=soft_mask,
            token_weights=token_weights,
            num_items=num_items,
            **self.keywords(),
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords().items())

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError("KDLoss: got compiled by TorchScript, which has no such arguments; use torch.compile")


# What is checked when a keyword is given, or its attribute set.
_CHECKS: dict[str, Callable[[Any], object]] = {
    "temperature": _validate.check_temperature,
    "hard_weight": _validate.check_hard_weight,
    "soft_weight": partial(_validate.check_number, "soft_weight"),
    "divergence": resolve,
    "scale_soft_by_t2": partial(_validate.check_bool, "scale_soft_by_t2"),
    "label_smoothing": _validate.check_label_smoothing,
    "ignore_index": partial(_validate.check_int, "ignore_index"),
    "reduction": _validate.check_reduction,
    "vocab_size": _validate.check_vocab_size,
    "z_loss_weight": partial(_validate.check_number, "z_loss_weight"),
    "inplace_backward": partial(_validate.check_bool, "inplace_backward"),
    "return_parts": partial(_validate.check_bool, "return_parts"),
    "chunk_rows": _validate.check_chunk_rows,
    "backend": _dispatch.requested,
    "vocab_group": _slices.check_group,
}
_HINTS = _keywords.ELSEWHERE | dict.fromkeys(
    ("mask", "soft_mask", "token_weights", "num_items"), "it comes at each call"
)
_HINTS_OF_CALL = _keywords.ELSEWHERE | dict.fromkeys(_CHECKS, "it is given to KDLoss(...), or set as its attribute")
_FLOATS = ("temperature", "hard_weight", "soft_weight", "label_smoothing", "z_loss_weight")

# What torch.load(weights_only=True) needs for a module that holds this one; none of them does anything when made.
add_safe_globals([KDLoss, Divergence, Formula])
