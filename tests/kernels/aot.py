"""Compile every Triton kernel ahead of time, with no GPU, and print what came out as JSON.

A program of its own because Triton decides at import whether it interprets, as the rest of the suite does.
Usage: python tests/kernels/aot.py sm_90 [kernel-name-substring]
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastkd._request import HiddenKind, Mix, RowSpec
from fastkd.divergences import JSD, NAMED, Divergence
from fastkd.kernels.config import hidden_options, launch_options
from fastkd.kernels.divergence import moment_rule
from fastkd.kernels.hidden import hidden_rows_kernel
from fastkd.kernels.kd_rows import kd_rows_kernel
from fastkd.kernels.log_softmax import log_softmax_backward_kernel, log_softmax_kernel
from fastkd.kernels.scale import scale_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LARGE = 128256
WIDEST = 16384  # hidden states that registers hold

# One member of each structure.
MEMBERS = (*NAMED.values(), JSD(0.5))


Case = tuple[str, Any, dict[str, Any], dict[str, Any]]


def cases() -> Iterator[Case]:
    """(name, kernel, argument types, constants). Types are Triton's; what is 16-aligned ends in +."""
    for dtype in ("bf16", "fp16", "fp32"):
        for peel in (False, True):
            tiles = {"VEC": 4 if dtype == "fp32" else 8, "PEEL": peel}
            suffix = f"{dtype}{'-unaligned' if peel else ''}"
            for name, kernel, matrices, vectors in (
                ("scale", scale_kernel, ("x",), ("scalar",)),
                ("log_softmax", log_softmax_kernel, ("x", "out"), ("lse",)),
                ("log_softmax_backward", log_softmax_backward_kernel, ("dy", "x", "dx"), ("lse",)),
            ):
                yield f"{name}-{suffix}", kernel, argument_types(dtype, peel, matrices, vectors), tiles
            for member in MEMBERS if dtype == "bf16" else MEMBERS[:1]:
                for mode in ("fused", "loss", "grad"):
                    yield kd_rows(f"{member.name}-{mode}-{suffix}", dtype, tiles, member, mode)
        for width in (768, WIDEST):
            for kind in HiddenKind:
                types = argument_types(dtype, False, ("s", "t", "ds"), ("scale", "loss"))
                constants = {"KIND": int(kind), "WIDTH": width}
                yield f"hidden-{kind.name.lower()}-{dtype}-{width}", hidden_rows_kernel, types, constants
    tiles = {"VEC": 8, "PEEL": False}
    yield kd_rows("soft-fused-bf16", "bf16", tiles, MEMBERS[0], "fused", hard=False)
    yield kd_rows("hard-fused-bf16", "bf16", tiles, MEMBERS[0], "fused", soft=False)
    yield kd_rows("smooth-fused-bf16", "bf16", tiles, MEMBERS[0], "fused", POWER=0, SMOOTH=True)


def argument_types(
    dtype: str, peel: bool, matrices: tuple[str, ...], vectors: tuple[str, ...], numbers: tuple[str, ...] = ()
) -> dict[str, str]:
    size = "i32" if peel else "i32+"
    types = {f"{name}_ptr": f"*{dtype}+" for name in matrices}
    types |= {f"{name}_{level}": size for name in matrices for level in ("outer", "inner")}
    types |= {f"{name}_ptr": "*fp32+" for name in vectors}
    types |= dict.fromkeys(("temperature", *numbers), "fp32")
    return types | {"inner_rows": "i32", "n": size, "columns": size, "y_ptr": "*i64+"}


def kd_rows(
    name: str,
    dtype: str,
    tiles: dict[str, Any],
    member: Divergence,
    mode: str,
    hard: bool = True,
    soft: bool = True,
    **changes: Any,
) -> Case:
    vectors = ("hard_scale", "soft_scale", "hard", "soft", "stats")
    types = argument_types(dtype, tiles["PEEL"], ("z", "u", "dz"), vectors, ("c_t", "c_s", "w", "smoothing"))
    mix = mix_of(member)
    constants = tiles | dict(
        FORMULA=int(member.formula), MIX=int(mix), MOMENT=moment_rule(member.formula, mix), POWER=2, SMOOTH=False,
        FROM_STATS=mode == "grad",
    ) | changes  # fmt: skip
    absent = {"fused": (), "loss": ("dz_ptr",), "grad": ("hard_ptr", "soft_ptr")}[mode]
    absent += () if hard else ("y_ptr", "hard_scale_ptr")
    absent += () if soft else ("u_ptr", "soft_scale_ptr")
    return f"kd_rows-{name}", kd_rows_kernel, types, constants | dict.fromkeys(absent)


def mix_of(member: Divergence) -> Mix:
    return RowSpec(1.0, member.formula, member.c_t, member.c_s, member.w, 0.0, LARGE).mix


def compile_case(kernel: Any, types: dict[str, Any], constants: dict[str, Any], target: GPUTarget) -> Any:
    constants = dict(constants)
    if "WIDTH" in constants:
        options = dict(hidden_options(constants.pop("WIDTH"), target.warp_size))
    else:
        options = dict(launch_options(LARGE, target.warp_size, heavy=constants.get("MIX") == Mix.BOTH))
    constants["BLOCK"] = options.pop("BLOCK")
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
            "loads_16": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
            "stores_16": len(re.findall(r"(?:global|buffer)_store_dwordx4", text)),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = compiled.asm["ptx"]
    return {
        "spills": sum(int(count) for count in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        "registers": max(int(count) for count in re.findall(r"REG:(\d+)", usage)),
        "loads_16": len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64", text)),
        "stores_16": len(re.findall(r"st\.global[\w.:]*\.v4\.b32|st\.global[\w.:]*\.v2\.b64", text)),
    }


def main() -> None:
    target = TARGETS[sys.argv[1]]
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    result = {}
    for name, kernel, types, constants in cases():
        if only in name:
            result[name] = resources(compile_case(kernel, types, constants, target), target)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
