"""The loss of hidden states: one row a program, in registers.

Math    mse: loss = Σ (s − t)²/H, ds = scale·2/H·(s − t).
        cosine: with e = s/‖s‖ − t/‖t‖, loss = 1 − cos = Σ e²/2, whose digits last as the two come together;
        ds = scale/‖s‖·(e − loss·s/‖s‖). A vector of zeros has no direction: loss 1, ds = 0.
Shapes  s, t, ds [B, S, H] bf16|fp16|fp32, last stride 1; scale, loss [N] fp32
Bytes   3e an element, e bytes wide: the floor. Beyond H = 16384 registers spill.
Grid    one program a row, all of it one block. A row whose scale is 0 is not read.
"""

import triton
import triton.language as tl

from fastkd._request import HiddenKind
from fastkd.kernels.config import device_of, gpu_of, hidden_options, row_strides
from fastkd.kernels.lse import row_start

COSINE = tl.constexpr(int(HiddenKind.COSINE))


@triton.jit(do_not_specialize=["inner_rows"], do_not_specialize_on_alignment=["scale_ptr", "loss_ptr"])
def hidden_rows_kernel(
    s_ptr, t_ptr, scale_ptr, loss_ptr, ds_ptr, inner_rows, s_outer, s_inner, t_outer, t_inner, ds_outer, ds_inner,
    columns, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    GRAD: tl.constexpr = ds_ptr is not None
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < columns
    scale = tl.load(scale_ptr + row)
    loss = 0.0
    ds = tl.zeros([BLOCK], tl.float32)
    if scale != 0.0:
        s_row = s_ptr + row_start(row, inner_rows, s_outer, s_inner)
        t_row = t_ptr + row_start(row, inner_rows, t_outer, t_inner)
        s = tl.load(s_row + cols, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(t_row + cols, mask=inside, other=0.0).to(tl.float32)
        if KIND == COSINE:
            a = inverse_norm(s)
            b = inverse_norm(t)
            s *= a
            e = s - t * b
            loss = tl.where((a == 0.0) | (b == 0.0), 1.0, tl.sum(e * e, 0) * 0.5)
            ds = (e - loss * s) * tl.where(b == 0.0, 0.0, scale * a)
        else:
            e = s - t
            loss = tl.sum(e * e, 0) / columns
            ds = e * (scale * 2.0 / columns)
    tl.store(loss_ptr + row, loss)
    if GRAD:
        ds_row = ds_ptr + row_start(row, inner_rows, ds_outer, ds_inner)
        tl.store(ds_row + cols, ds.to(ds_ptr.dtype.element_ty), mask=inside)


@triton.jit
def inverse_norm(x):
    """1/‖x‖; 0 for zeros, NaN where the square is infinite."""
    square = tl.sum(x * x, 0)
    return tl.where(square == 0.0, 0.0, (1.0 + 0.0 * square) / tl.sqrt(square))


def hidden_rows(student, teacher, scale, kind: int, losses, grad) -> None:
    """Fill ``losses`` [N], and ``grad`` if it is given, from [B, S, H] views."""
    outer, inner, columns = student.shape
    if outer * inner == 0:
        return
    with device_of(student):
        hidden_rows_kernel[(outer * inner,)](
            student, teacher, scale, losses, grad, inner, *row_strides(student), *row_strides(teacher),
            *row_strides(grad), columns, KIND=kind, **hidden_options(gpu_of(student), columns),
        )  # fmt: skip
