"""The loop over chunks of rows, for logits that are not there yet: those of a chunk are all that exists at a time.

A source is asked two things: the logits of these rows, and what to do with their gradient. PyTorch multiplies the
matrices, a backend does the row operation between the products, on the chunk where it lies. So the loss and its
gradient cost four products (student, teacher, gradients of hidden states and of the matrix), and one less for every
matrix or hidden states that want no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from fastkd import _slices, _sparse
from fastkd._request import WHOLE, Place, Rows, RowSpec
from fastkd._views import row_views
from fastkd.sources import LinearLogits, TopK

# Bytes of the logits that exist at once, and of their gradient where it is apart. Every chunk has the matrices read,
# and a sum as large read and written: few rows make the products wait for memory, many fill it for little.
CHUNK_BYTES_CPU, CHUNK_BYTES_OTHER = 64 * 2**20, 512 * 2**20
# Rows of logits start on 64 bytes, since matrix units slow down where they do not (V = 50257).
ALIGNED = 16
# Rows of the matrix that a CPU multiplies at a time. Logits of few hidden states are computed the faster for it, since
# so many rows stay in its cache (an AMD EPYC, by MKL: 1.2 times for 256 states, 1.6 for 16, none for 2048); a matrix of
# half precision is widened by the block, as most multiply float32 many times as fast (the same without bfloat16
# instructions: 7 to 140 times, by the layout).
BLOCK_ROWS = 512
# Of a product that goes by way of a narrower dtype.
BLOCK_BYTES = 4 * 2**20


def default_chunk_rows(row_bytes: int, is_cpu: bool) -> int:
    """Multiples of 128, the tile of the products, where so many fit."""
    rows = max(1, (CHUNK_BYTES_CPU if is_cpu else CHUNK_BYTES_OTHER) // row_bytes)
    return rows if rows < 128 else rows // 128 * 128


def logits_like(source: Tensor | LinearLogits, autocast: torch.dtype | None) -> Tensor:
    """A tensor with the shape, dtype and device of the logits, and no memory: what arguments are checked against."""
    if isinstance(source, Tensor):
        return source
    hidden, weight = source.hidden, source.weight  # PyTorch 2.6 compiles no slice of a named tuple
    return hidden.new_empty((), dtype=product_dtype(hidden, autocast)).expand(*hidden.shape[:-1], len(weight))


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def product_dtype(hidden: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """What hidden states and matrix are multiplied in: autocast's dtype, or their own."""
    return hidden.dtype if autocast is None or hidden.dtype == torch.float64 else autocast


class Vectors(NamedTuple):
    """What there is a number of for each row, [N]; see ``Rows``."""

    labels: Tensor | None
    hard_scale: Tensor | None
    soft_scale: Tensor | None
    z_scale: Tensor | None


# Rows of [0, N): a slice, or on a CPU the numbers of those that count.
Selection: TypeAlias = slice | Tensor


class Source(Protocol):
    row_bytes: int  # that exist for a row of the chunk

    def logits(self, rows: Selection) -> tuple[Tensor, Tensor | None]:
        """(the logits of these rows [R, V], where their gradient is to be written): those last asked for exist."""

    def backward(self, rows: Selection, grad: Tensor) -> None:
        """Take the gradient of the rows last asked for, which is now written where it was to be."""

    def grads(self) -> list[Tensor | None]:
        """What the caller gets of it all: of logits; or of hidden states, matrix and bias."""


def linear_rows(
    student: Tensor | LinearLogits, teacher: Tensor | LinearLogits | TopK | None, vectors: Vectors, spec: RowSpec,
    losses: Sequence[Tensor], autocast: torch.dtype | None, chunk_rows: int | None, wants: Sequence[bool], place: Place,
    inplace: bool = False,
) -> list[Tensor | None]:  # fmt: skip
    """Fill ``losses``, hard [N], soft [N], stats [N, 8]; gradients of those of the student's tensors that are wanted.

    A ``TopK`` is of [N, K] here. On a CPU rows that do not count are left out of the products, and have losses of 0;
    elsewhere, looking would wait, and their hidden states, which may be NaN, are taken for 0.

    ``inplace``: the gradient of logits goes over them.
    """
    is_cpu = losses[0].is_cpu
    counts: Tensor | None = None
    if isinstance(student, LinearLogits) or isinstance(teacher, LinearLogits):
        counts = functools.reduce(torch.logical_or, (scale != 0 for scale in vectors[1:] if scale is not None))
    counted = None
    if counts is not None and _looking_is_free(counts):
        counted = None if bool(counts.all()) else counts.nonzero().squeeze(1)
        counts = None
    if counted is not None:
        for whole in losses:
            whole.zero_()
    z_source = _source(student, spec.vocab_size, autocast, wants, counted is None, counts, inplace, place)
    u_source = None
    if teacher is not None and not isinstance(teacher, TopK):
        u_source = _source(teacher, spec.vocab_size, autocast, place=place)
    count = len(losses[0] if counted is None else counted)
    row_bytes = z_source.row_bytes + (u_source.row_bytes if u_source else 0)
    agreed = (count, *wants)
    step = chunk_rows or (default_chunk_rows(row_bytes, is_cpu) if row_bytes else max(1, count))
    # Ranks of a sliced vocabulary exchange something at least, lest one without rows go on where others wait.
    for start in range(0, max(count, bool(place.group)), step):
        at = slice(start, min(start + step, count))
        rows = at if counted is None else counted[at]
        z, dz = z_source.logits(rows)
        u = None if u_source is None else u_source.logits(rows)[0]
        of_chunk = [whole.new_empty(at.stop - at.start, *whole.shape[1:]) for whole in losses]
        views = iter(row_views(*(t for t in (z, u, dz) if t is not None)))
        part = Rows(next(views), None if u is None else next(views), *(v if v is None else v[rows] for v in vectors))
        hard, soft, stats = of_chunk
        out = next(views, None)
        if isinstance(teacher, TopK):
            of_teacher = teacher._replace(ids=teacher.ids[rows], log_probs=teacher.log_probs[rows])
            _sparse.kd_rows(part, of_teacher, spec, hard, soft, stats, out, place, agreed)
        else:
            _slices.choose(z, place, u, agreed=agreed).kd_rows(part, spec, hard, soft, stats, out)
        for whole, some in zip(losses, of_chunk, strict=True):
            whole[rows] = some
        if dz is not None:
            z_source.backward(rows, dz)
    return z_source.grads()


def chunks(source: Tensor | LinearLogits) -> Iterator[Tensor]:
    """Its logits [R, V], of all rows, each chunk gone with the next; one of no rows where there are none."""
    autocast = autocast_dtype(source if isinstance(source, Tensor) else source.hidden)
    like = logits_like(source, autocast)
    count, columns = like.shape[:-1].numel(), like.shape[-1]
    with torch.autocast(like.device.type, enabled=False):
        of_source = _source(source, columns, autocast)
        step = default_chunk_rows(max(of_source.row_bytes, 4 * columns), like.is_cpu)
        for start in range(0, max(1, count), step):
            yield of_source.logits(slice(start, min(start + step, count)))[0].reshape(-1, columns)


def _looking_is_free(tensor: Tensor) -> bool:
    return tensor.is_cpu


def _source(
    source: Tensor | LinearLogits,
    vocab_size: int,
    autocast: torch.dtype | None,
    wants: Sequence[bool] = (False, False, False),
    all_rows: bool = True,
    counts: Tensor | None = None,
    inplace: bool = False,
    place: Place = WHOLE,
) -> Source:
    if isinstance(source, Tensor):
        return Whole(source, wants[0], all_rows, inplace)
    tokens = _slices.tokens_of(place, vocab_size, len(source.weight))
    return Linear(source, tokens, product_dtype(source.hidden, autocast), wants, counts, place)


class Whole:
    """Logits that are in memory."""

    row_bytes = 0

    def __init__(self, logits: Tensor, want_grad: bool, all_rows: bool, inplace: bool) -> None:
        (self._logits,) = row_views(logits)  # [B, S, V]
        self._grad: Tensor | None = None
        if want_grad:
            shape = logits.shape[:-1].numel(), logits.shape[-1]
            if inplace:
                self._grad = logits.view(shape)
            else:
                self._grad = logits.new_empty(shape) if all_rows else logits.new_zeros(shape)

    def logits(self, rows: Selection) -> tuple[Tensor, Tensor | None]:
        outer, inner, columns = self._logits.shape
        if isinstance(rows, slice) and rows.stop - rows.start == outer * inner:
            return self._logits, None if self._grad is None else self._grad.view(outer, inner, columns)
        if self._grad is None:
            grad = None
        elif isinstance(rows, slice):
            grad = self._grad[rows]
        else:
            grad = self._grad.new_empty(len(rows), self._grad.shape[1])
        if len(self._logits) == 1:
            return self._logits[0][rows], grad
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self._logits.device)
        return self._logits[rows // inner, rows % inner], grad

    def backward(self, rows: Selection, grad: Tensor) -> None:
        if not isinstance(rows, slice):
            assert self._grad is not None
            self._grad[rows] = grad

    def grads(self) -> list[Tensor | None]:
        return [self._grad, None, None]


class Linear:
    """Logits of hidden states: ``softcap·tanh(x/softcap)`` of ``x = scale·(hidden @ weight.T + bias)``."""

    def __init__(
        self,
        source: LinearLogits,
        vocab_size: int,
        product_dtype: torch.dtype,
        wants: Sequence[bool] = (False, False, False),  # gradients of hidden states, matrix and bias
        counts: Tensor | None = None,  # [N] which rows may be multiplied; all if None
        place: Place = WHOLE,
    ) -> None:
        hidden, weight, bias, self._scale, self._softcap = source
        self._hidden = hidden.reshape(-1, hidden.shape[-1])
        self._counts = None if counts is None else counts.unsqueeze(1)
        self._weight = weight[:vocab_size].to(product_dtype)
        self._bias = None if bias is None else bias[:vocab_size]
        self._memory: dict[str, Tensor] = {}
        # Logits of half precision are wanted in float32, which the products sum in. A GPU's matrix units take and give
        # their gradient in half; a CPU has none, and is given all in float32, the matrix block by block.
        sums = torch.promote_types(product_dtype, torch.float32)
        self._dtype = sums if weight.is_cpu or _gives_float32(weight.device) else product_dtype
        self._factors = sums if weight.is_cpu else product_dtype  # the dtype of what is multiplied
        # A gradient as wide as its logits is written over them, unless softcap's derivative needs these.
        self._want_grad = any(wants)
        self._in_place = self._dtype == self._factors and self._softcap is None
        # Over the chunks a gradient is summed in float32, and rounded once.
        # That of the hidden states, whole for each row of a chunk, has a part on each rank of a sliced vocabulary.
        self._group = place.group
        # It lies row by row, whatever their strides: backward scales it where it lies.
        of_hidden = sums if place.group else hidden.dtype
        self._of_hidden = hidden.new_zeros(self._hidden.shape, dtype=of_hidden) if wants[0] else None
        self._of_weight = weight.new_empty(weight.shape, dtype=sums) if wants[1] else None
        self._of_bias = None if bias is None or not wants[2] else torch.zeros_like(bias, dtype=sums)
        self._summed = False
        self._dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        apart = self._want_grad and not self._in_place
        # The ranks of a sliced vocabulary must come to the same number of chunks.
        columns = place.width or len(self._weight)
        self.row_bytes = columns * (self._dtype.itemsize + apart * self._factors.itemsize)

    def logits(self, rows: Selection) -> tuple[Tensor, Tensor | None]:
        self._chunk = self._hidden[rows].to(self._weight.dtype).to(self._factors)
        if self._counts is not None:  # 0·NaN would reach the gradient of the matrix
            self._chunk = torch.where(self._counts[rows], self._chunk, 0.0)
        factor = self._scale if self._softcap is None else self._scale / self._softcap
        self._logits = logits = self._of_chunk("logits", self._dtype)
        if self._bias is not None:
            logits.copy_(self._bias)
        for columns, weight in self._blocks(whole=not logits.is_cpu):
            _multiply(self._chunk, weight.T, logits[:, columns], factor, 0.0 if self._bias is None else factor)
        if self._softcap is not None:
            logits.tanh_().mul_(self._softcap)
        if not self._want_grad:
            return logits, None
        return logits, logits if self._in_place else self._of_chunk("gradient", self._factors)

    def backward(self, rows: Selection, grad: Tensor) -> None:
        if self._softcap is not None:  # 1 − tanh²
            grad.addcmul_(grad, self._logits.square_(), value=-(self._softcap**-2))
        if self._of_hidden is not None:
            dtype = torch.promote_types(self._of_hidden.dtype, grad.dtype)
            part = self._of_hidden.new_empty(self._chunk.shape, dtype=dtype)
            for columns, weight in self._blocks(whole=self._weight.dtype == self._factors):
                _multiply(grad[:, columns], weight, part, self._scale, float(columns.start > 0))
            self._of_hidden[rows] = part.to(self._of_hidden.dtype)
        if self._of_weight is not None:
            _multiply(grad.T, self._chunk, self._of_weight[: len(self._weight)], self._scale, float(self._summed))
        if self._of_bias is not None:
            self._of_bias[: len(self._weight)].add_(grad.sum(0, dtype=self._of_bias.dtype), alpha=self._scale)
        self._summed = True

    def _blocks(self, whole: bool) -> Iterator[tuple[slice, Tensor]]:
        """The matrix as it is multiplied, and which columns of the logits are its rows': all at once, or a few."""
        step = max(1, len(self._weight)) if whole else BLOCK_ROWS
        for start in range(0, max(1, len(self._weight)), step):  # of a slice without tokens, an empty one
            columns = slice(start, start + step)
            yield columns, self._weight[columns].to(self._factors)

    def grads(self) -> list[Tensor | None]:
        if self._of_weight is not None:  # what no product has written
            self._of_weight[len(self._weight) if self._summed else 0 :].zero_()
        if self._of_hidden is not None and self._group:  # once in all: in chunks it would be as many bytes
            self._of_hidden = _slices.summed(self._of_hidden, self._group)
        each = (self._of_hidden, self._of_weight, self._of_bias)
        return [grad if grad is None else grad.to(dtype) for grad, dtype in zip(each, self._dtypes, strict=True)]

    def _of_chunk(self, name: str, dtype: torch.dtype) -> Tensor:
        """Memory [R, n] that one chunk leaves to the next; the first is the largest."""
        columns = len(self._weight)
        if name not in self._memory:
            padded = -(-columns // ALIGNED) * ALIGNED
            self._memory[name] = self._chunk.new_empty(len(self._chunk), padded, dtype=dtype)
        return self._memory[name][: len(self._chunk), :columns]


def _multiply(a: Tensor, b: Tensor, out: Tensor, alpha: float, beta: float) -> None:
    """``out = alpha·a @ b + beta·out``, rounded once, to out's dtype, where the device can."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out=out)
    elif out.dtype == torch.float32 and _gives_float32(out.device):
        torch.addmm(out, a, b, out_dtype=torch.float32, alpha=alpha, beta=beta, out=out)
    else:
        step = max(1, BLOCK_BYTES // (out.shape[1] * out.itemsize))
        for start in range(0, len(a), step):  # the product has memory of its own
            rows = slice(start, start + step)
            product = a[rows] @ b
            if beta == 0.0:  # whatever out holds, NaN included
                out[rows].copy_(product).mul_(alpha)
            else:
                out[rows].mul_(beta).add_(product, alpha=alpha)


@functools.cache
def _gives_float32(device: torch.device) -> bool:
    """Whether a GPU multiplies matrices of half precision into float32. Asked by trying: what can varies by version."""
    if device.type != "cuda":
        return False
    half, single = (torch.zeros(16, 16, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.addmm(single, half, half, out_dtype=torch.float32, out=single)
    except (RuntimeError, TypeError):
        return False
    return True
