"""Row views: logits of any leading shape as [B, S, V] without a copy wherever their strides allow it."""

from __future__ import annotations

from torch import Tensor


def row_views(*tensors: Tensor) -> list[Tensor]:
    """The tensors ``(..., V_i)``, of one leading shape, as [B, S, V_i] with the same B and S and a last stride of 1.

    B = 1 where all rows are evenly spaced; else S is the last leading dimension (``logits[:, :-1]``, say). Tensors
    that fit neither are copied.
    """
    leading = tensors[0].shape[:-1]
    rows = leading.numel()
    if all([tensor.is_contiguous() for tensor in tensors]):
        return [tensor.view(1, rows, tensor.shape[-1]) for tensor in tensors]
    for inner in (rows, leading[-1] if leading else 1):
        views = [_view(tensor, inner) for tensor in tensors]
        if None not in views:
            return views  # type: ignore[return-value]
    return [tensor.contiguous().view(1, rows, tensor.shape[-1]) for tensor in tensors]


def _view(tensor: Tensor, inner: int) -> Tensor | None:
    if tensor.stride(-1) != 1 or inner == 0:
        return None
    try:
        return tensor.view(-1, inner, tensor.shape[-1])
    except RuntimeError:  # "view size is not compatible": these strides need more dimensions
        return None


def flat(tensor: Tensor) -> Tensor:
    """Per-row values ``(...)`` as [N], contiguous."""
    return tensor if tensor.dim() == 1 and tensor.is_contiguous() else tensor.reshape(-1).contiguous()
