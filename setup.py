"""Builds what this machine has the compilers for. Metadata is in pyproject.toml.

An optional part that fails to build is left out with one line of warning, and the backend that needs it says so
(``python -m fastkd info``). ``FASTKD_REQUIRE=cpu,cuda`` (a comma-separated list) makes its failure the install's.
Without nvcc there is no CUDA part, and no warning. ``FASTKD_CUDA_ARCHS`` lists what it is compiled for; by default what
this nvcc knows of sm_80, 90, 100 and 120.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA_HOME = os.environ.get("CUDA_HOME")
NVCC = (
    (CUDA_HOME and shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")))
    or shutil.which("nvcc")
    or shutil.which("nvcc", path="/usr/local/cuda/bin")
)
CUDA_ARCHS = ("80", "90", "100", "120")


def listed(variable: str) -> list[str]:
    return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]


REQUIRED = listed("FASTKD_REQUIRE")

# -fopenmp-simd is the pragma alone, no library. The two -fno- drop C's floating-point flags and errno, which would
# keep loops scalar; infinities and NaN stay exact.
FLAGS = [
    "-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd",
    "-funroll-loops",
]  # fmt: skip
ISA_FLAGS = {"generic": []}
X86 = platform.machine().lower() in ("x86_64", "amd64") and "arm64" not in os.environ.get("ARCHFLAGS", "")
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"
    ]  # fmt: skip


class BuildOptional(build_ext):
    """Compiles csrc/cpu/rows.cpp once an instruction set, and survives a failure unless the part is required."""

    def build_extension(self, ext: Extension) -> None:
        part = ext.name.rpartition("._")[2]
        ext.optional = part not in REQUIRED
        try:
            import pybind11

            if self.compiler.compiler_type != "unix":
                raise RuntimeError(f"needs g++ or clang, not {self.compiler.compiler_type}")
            ext.include_dirs = [pybind11.get_include()]
            if part == "cuda":
                self.build_cuda(ext)
            else:
                ext.extra_objects = [obj for isa in ISA_FLAGS for obj in self.compile_rows(isa)]
                super().build_extension(ext)
        except Exception as error:
            if not ext.optional:
                raise
            reason = " ".join(str(error).split())[:300]
            print(f"fastkd: backend {part!r} was not built and will be unavailable: {reason}", file=sys.stderr)

    def compile_rows(self, isa: str) -> list[str]:
        return self.compiler.compile(
            ["csrc/cpu/rows.cpp"],
            output_dir=os.path.join(self.build_temp, isa),
            macros=[("FASTKD_ISA", isa), ("FASTKD_ISA_NAME", f'"{isa}"')],
            extra_postargs=[*FLAGS, *ISA_FLAGS[isa]],
        )

    def build_cuda(self, ext: Extension) -> None:
        """Compile and link by nvcc, which knows its own headers and the static runtime; sources side by side."""
        if NVCC is None:
            raise RuntimeError("needs nvcc")
        includes = [f"-I{folder}" for folder in (*ext.include_dirs, sysconfig.get_path("include"))]
        flags = ["-std=c++17", "-O3", "-ftz=true", "-Xcompiler", "-fPIC,-fvisibility=hidden", *architectures()]
        # Objects of other flags, or of another nvcc, are not these.
        key = hashlib.sha256(" ".join([*flags, run([NVCC, "--version"])]).encode()).hexdigest()[:16]
        folder = os.path.join(self.build_temp, "cuda", key)
        os.makedirs(folder, exist_ok=True)
        headers = max(os.path.getmtime(path) for path in glob("csrc/*.h") + glob("csrc/cuda/*.*h"))

        def compile_one(source: str) -> str:
            target = os.path.join(folder, os.path.basename(source) + ".o")
            newest = max(headers, os.path.getmtime(source))
            if self.force or not os.path.exists(target) or os.path.getmtime(target) < newest:
                run([NVCC, *flags, *includes, "-c", source, "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        library = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(library), exist_ok=True)
        run([NVCC, "-shared", "-cudart=static", *objects, "-o", library])


def architectures() -> list[str]:
    """nvcc's options. Machine code for each, and for GPUs to come the newest as PTX.

    Not below 90, though: that PTX has no clusters, which are launched on every GPU from sm_90 on.
    """
    known = run([NVCC, "--list-gpu-arch"]).split()
    archs = [arch.replace(".", "") for arch in listed("FASTKD_CUDA_ARCHS")] or [
        arch for arch in CUDA_ARCHS if f"compute_{arch}" in known
    ]
    options = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = max(archs, key=lambda arch: int(arch.rstrip("af")))
    if newest.isdigit() and int(newest) >= 90:
        options.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return options


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{os.path.basename(command[0])} failed: {result.stderr or result.stdout}")
    return result.stdout


CUDA = Extension("fastkd._cuda", sources=[*sorted(glob("csrc/cuda/*.cu")), "csrc/cuda/binding.cpp"], optional=True)

setup(
    ext_modules=[
        Extension(
            "fastkd._cpu",
            sources=["csrc/binding.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/threads.cpp"],
            depends=[*glob("csrc/*.h"), *glob("csrc/cpu/*"), "setup.py"],
            define_macros=[("FASTKD_X86", "1")] if X86 else [],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        ),
        *([CUDA] if NVCC or "cuda" in REQUIRED else []),
    ],
    cmdclass={"build_ext": BuildOptional},
)
