"""Compile every Triton kernel ahead of time, with no GPU, and print what came out as JSON.

A program of its own because Triton decides at import whether it interprets, as the rest of the suite does.
Usage: python tests/kernels/aot.py sm_90 [kernel-name-substring]
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.append(str(Path(__file__).parents[2]))  # for `import tests.…`

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastkd._request import HiddenKind, Mix, RowSpec
from fastkd.divergences import JSD, NAMED, Divergence, SymmetricKL
from fastkd.kernels import config, log_softmax
from fastkd.kernels.divergence import MOMENT_BOTH, MOMENT_NONE, moment_rule
from fastkd.kernels.hidden import hidden_rows_kernel
from fastkd.kernels.kd_rows import (
    kd_rows_kernel,
    slice_gradient_kernel,
    slice_state_kernel,
    slice_sums_kernel,
)
from fastkd.kernels.rest import list_kernel, rest_grad_kernel, rest_kernel
from fastkd.kernels.scale import scale_kernel
from fastkd.kernels.slices import row_sums_kernel
from tests.kernels.columns import row_of

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
LARGE = 128256
WIDEST = 16384  # hidden states that registers hold
# Of which the instructions of a row are counted.
COUNTED = ("kd_rows-forward_kl-fused-bf16", "kd_rows-jsd-fused-bf16")

# One member of each structure.
MEMBERS = (*NAMED.values(), SymmetricKL(0.5), JSD(0.5))
# Those that are asked for the sums of a slice; of mixtures the longest.
SUMMED = (Divergence("mine", c_t=0.3, c_s=0.7, w=0.25), NAMED["tvd"], SymmetricKL(0.5))


Case = tuple[str, Any, dict[str, Any], dict[str, Any]]


def cases(target: str) -> Iterator[Case]:
    """(name, kernel, argument types, constants). Types are Triton's; what is 16-aligned ends in +.

    One target of each vendor compiles each kernel in each dtype, the others what differs most.
    """
    thorough = target in ("sm_90", "gfx942")
    for dtype, peel in THOROUGH if thorough else THOROUGH[:1]:
        tiles = {"VEC": 4 if dtype == "fp32" else 8, "PEEL": peel}
        suffix = f"{dtype}{'-unaligned' if peel else ''}"
        for name, kernel, matrices in SMALL:
            constants = tiles | ({"MAX": config.MAX_SLICES} if "MAX" in kernel.arg_names else {})
            yield f"{name}-{suffix}", kernel, argument_types(kernel, dtype, peel, matrices), constants
        for width, kind in itertools.product(() if peel else (768, WIDEST)[: 1 + thorough], HiddenKind):
            types = argument_types(hidden_rows_kernel, dtype, False, ("s", "t", "ds"))
            constants = {"KIND": int(kind), "WIDTH": width}
            yield f"hidden-{kind.name.lower()}-{dtype}-{width}", hidden_rows_kernel, types, constants
        yield from rest(suffix, dtype, tiles)
        for member in MEMBERS if thorough and (dtype, peel) == THOROUGH[0] else (MEMBERS[0], MEMBERS[-1]):
            yield kd_rows(f"{member.name}-fused-{suffix}", dtype, tiles, member, "fused")
        for member in SUMMED if thorough else SUMMED[:1]:
            yield kd_rows(f"{member.name}-row-sums-{suffix}", dtype, tiles, member, "row_sums")
    tiles = {"VEC": 8, "PEEL": False}
    for member in (MEMBERS[0], MEMBERS[-1]) if thorough else MEMBERS[:1]:
        for mode in ("loss", "grad", "state", "sums", "slice"):
            yield kd_rows(f"{member.name}-{mode}-bf16", "bf16", tiles, member, mode)
    if thorough:
        yield kd_rows("soft-fused-bf16", "bf16", tiles, MEMBERS[0], "fused", hard=False)
        yield kd_rows("hard-fused-bf16", "bf16", tiles, MEMBERS[0], "fused", soft=False)
        yield kd_rows("z-loss-fused-bf16", "bf16", tiles, MEMBERS[0], "fused", z_loss=True)
        yield kd_rows("smooth-fused-bf16", "bf16", tiles, MEMBERS[0], "fused", POWER=0, SMOOTH=True)


THOROUGH = (("bf16", False), ("bf16", True), ("fp16", False), ("fp32", False))
SMALL = (
    ("scale", scale_kernel, ("x",)),
    ("log_softmax", log_softmax.log_softmax_kernel, ("x", "out")),
    ("log_softmax-state", log_softmax.slice_state_kernel, ("x",)),
    ("log_softmax-output", log_softmax.slice_output_kernel, ("x", "out")),
    ("log_softmax_backward", log_softmax.log_softmax_backward_kernel, ("dy", "x", "dx")),
    ("log_softmax_backward-sum", log_softmax.slice_sum_kernel, ("dy",)),
    ("log_softmax_backward-slice", log_softmax.slice_gradient_kernel, ("dy", "x", "dx")),
)


def argument_types(kernel: Any, dtype: str, peel: bool, matrices: tuple[str, ...]) -> dict[str, str]:
    size = "i32" if peel else "i32+"
    types = {name: "*fp32+" if name.endswith("_ptr") else "fp32" for name in kernel.arg_names}
    types |= {f"{name}_ptr": f"*{dtype}+" for name in matrices}
    types |= {f"{name}_{level}": size for name in matrices for level in ("outer", "inner")}
    types |= {"rows": "i32", "inner_rows": "i32", "slices": "i32", "n": size, "columns": size, "width": "i32+"}
    return types | {"y_ptr": "*i64+"}


# Where bits that list columns take the teacher's place, by VEC.
BITS = {4: "*u8", 8: "*i16"}
KERNELS = {
    "state": slice_state_kernel, "sums": slice_sums_kernel, "slice": slice_gradient_kernel, "row_sums": row_sums_kernel,
}  # fmt: skip


def kd_rows(
    name: str,
    dtype: str,
    tiles: dict[str, Any],
    member: Divergence,
    mode: str,
    hard: bool = True,
    soft: bool = True,
    z_loss: bool = False,
    **changes: Any,
) -> Case:
    kernel = KERNELS.get(mode, slice_gradient_kernel if mode == "grad" else kd_rows_kernel)
    types = argument_types(kernel, dtype, tiles["PEEL"], ("z", "u", "dz"))
    mix = mix_of(member)
    constants = tiles | dict(
        FORMULA=int(member.formula), MIX=int(mix), BALANCED=member.c_s * member.w == member.c_t * (1.0 - member.w),
        MOMENT=moment_rule(member.formula, mix), POWER=2, SMOOTH=False, MAX=config.MAX_SLICES,
    ) | changes  # fmt: skip
    absent = {"loss": ("dz_ptr",), "grad": ("hard_ptr", "soft_ptr", "states_ptr", "sums_ptr")}.get(mode, ())
    absent += () if hard else ("y_ptr", "hard_scale_ptr")
    absent += () if soft else ("u_ptr", "soft_scale_ptr")
    absent += () if z_loss else ("z_scale_ptr",)
    constants |= dict.fromkeys(absent)
    return f"kd_rows-{name}", kernel, types, {key: constants[key] for key in constants if key in kernel.arg_names}


def rest(suffix: str, dtype: str, tiles: dict[str, Any]) -> Iterator[Case]:
    """Each of its kernels with labels and a z-loss, of long lists."""
    constants = tiles | dict(FORMULA=0, MOMENT=MOMENT_NONE, POWER=2, SMOOTH=False, MAX=config.MAX_SLICES, LISTED=1024)
    lists = {"u_ptr": BITS[tiles["VEC"]], "bits_ptr": "*i32", "listed_ptr": "*i32"}
    sizes = {"num_listed": "i32", "words": "i32+"}
    small = (("list", list_kernel), ("row", rest_kernel)) if suffix == "bf16" else ()
    for name, kernel in (("state", slice_state_kernel), ("grad", rest_grad_kernel), *small):
        types = argument_types(kernel, dtype, tiles["PEEL"], ("z", "u", "dz")) | lists | sizes
        of_kernel = {key: constants[key] for key in constants if key in kernel.arg_names}
        yield f"rest-{name}-{suffix}", kernel, types, of_kernel


def mix_of(member: Divergence) -> Mix:
    return RowSpec(1.0, member.formula, member.c_t, member.c_s, member.w, 0.0, LARGE).mix


def compile_case(kernel: Any, types: dict[str, Any], constants: dict[str, Any], target: GPUTarget) -> Any:
    gpu = config.Gpu(target.arch, target.warp_size, 1, 1)
    constants = dict(constants)
    if "WIDTH" in constants:
        options = config.hidden_options(gpu, constants.pop("WIDTH"))
    elif "BLOCK" not in kernel.arg_names:
        options = {"num_warps": 1, "enable_fp_fusion": True}
    else:
        whole = kernel is kd_rows_kernel and config.is_heavy(
            gpu, constants["MIX"], constants["PEEL"], constants["MOMENT"] == MOMENT_BOTH
        )
        in_slices = kernel in KERNELS.values() and "states_ptr" not in constants and types["u_ptr"] not in BITS.values()
        options = config.launch_options(gpu, LARGE, constants["VEC"], heavy=whole or in_slices)
    if "BLOCK" in kernel.arg_names:
        constants["BLOCK"] = options.pop("BLOCK")
    if "FAST_LOG" in kernel.arg_names:
        constants["FAST_LOG"] = gpu.is_nvidia
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = types[name].rstrip("+")
            if types[name].endswith("+"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attributes)
    return triton.compile(source, target=target, options=options)


def resources(compiled: Any, target: GPUTarget) -> dict[str, int]:
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        # Vector registers, and bytes of memory a thread; scalar ones spill to lanes of vector registers, not to memory.
        spills = sum(map(int, re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text)))
        registers = max(int(count) for count in re.findall(r"\.vgpr_count:\s*(\d+)", text))
        return {
            "spills": spills,
            "registers": registers,
            "loads_16": len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", text)),
            "stores_16": len(re.findall(r"(?:global|buffer)_store_(?:dwordx4|b128)", text)),
        }
    usage = cuobjdump(compiled, "--dump-resource-usage")
    text = compiled.asm["ptx"]
    return {
        "spills": sum(int(count) for count in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        "registers": max(int(count) for count in re.findall(r"REG:(\d+)", usage)),
        "loads_16": len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64", text)),
        "stores_16": len(re.findall(r"st\.global[\w.:]*\.v4\.b32|st\.global[\w.:]*\.v2\.b64", text)),
    }


def cuobjdump(compiled: Any, *arguments: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    target = TARGETS[sys.argv[1]]
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    result = {}
    for name, kernel, types, constants in cases(sys.argv[1]):
        if only in name:
            compiled = compile_case(kernel, types, constants, target)
            result[name] = resources(compiled, target)
            if name in COUNTED and target.arch == 90:
                code = cuobjdump(compiled, "--dump-sass")
                result[name]["row"] = row_of(code, constants["MIX"] == Mix.BOTH)._asdict()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
