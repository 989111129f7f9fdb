"""Builds what this machine has the compilers for, and lays out the packages. Metadata is in pyproject.toml.

A part that is not built is left out with one line that says why, which ``python -m fastkd info`` repeats.
``FASTKD_REQUIRE=cpu,cuda`` (a comma-separated list) makes its failure the install's. The CUDA part takes minutes for
each GPU architecture: it is compiled for the GPUs that are here, or for those that ``FASTKD_CUDA_ARCHS=80,90`` names;
where there is none, it is left out, or compiled for all of sm_80, 90, 100 and 120 if it is required. ``none`` declines.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CUDA_HOME = os.environ.get("CUDA_HOME")
NVCC = (
    (CUDA_HOME and shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")))
    or shutil.which("nvcc")
    or shutil.which("nvcc", path="/usr/local/cuda/bin")
)
CUDA_ARCHS = ("80", "90", "100", "120")

# kernels/ and benchmarks/ stand at the top of the tree and install within fastkd: those names are not ours to take.
PACKAGE_DIR = {"fastkd": "fastkd", "fastkd.kernels": "kernels", "fastkd.bench": "benchmarks"}


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


class BuildPython(build_py):
    def run(self) -> None:
        if self.editable_mode:
            # setuptools' finder for editable installs comes last, after a folder named fastkd in the working directory,
            # which Python takes for a package: such is this tree, seen from its parent. Ask ours first; what setuptools
            # would warn of next is then no longer so.
            ours = "getattr(finder, '__module__', '').startswith('__editable___fastkd')"
            with open(os.path.join(self.get_finalized_command("install").install_lib, "fastkd_first.pth"), "w") as file:
                file.write(f"import sys; sys.meta_path.sort(key=lambda finder: not {ours})\n")
            warnings.filterwarnings("ignore", "Editable installation")
        else:  # What an earlier build left there, a module deleted since among it, would go into the wheel.
            shutil.rmtree(os.path.join(self.build_lib, "fastkd"), ignore_errors=True)
        super().run()


class BuildOptional(build_ext):
    """Compiles csrc/cpu/rows.cpp once an instruction set, and survives a failure unless the part is required.

    What was built for which processors, and why the rest was not, is recorded in the package, for ``fastkd._built``.
    """

    def run(self) -> None:
        self.built: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        super().run()
        package = "fastkd" if self.inplace else os.path.join(self.build_lib, "fastkd")
        os.makedirs(package, exist_ok=True)
        for part in self.left_out:  # An earlier build's would be taken for this one's.
            with suppress(FileNotFoundError):
                os.remove(os.path.join(package, self.get_ext_filename(f"_{part}")))
        with open(os.path.join(package, "_built.json"), "w") as file:
            json.dump({"built": self.built, "left_out": self.left_out}, file)

    def build_extension(self, ext: Extension) -> None:
        part = ext.name.rpartition("._")[2]
        ext.optional = part not in REQUIRED
        try:
            import pybind11

            if self.compiler.compiler_type != "unix":
                raise RuntimeError(f"needs g++ or clang, not {self.compiler.compiler_type}")
            ext.include_dirs = [pybind11.get_include()]
            if part == "cuda":
                archs = cuda_archs(required=not ext.optional)
                self.build_cuda(ext, archs)
                self.built[part] = ", ".join(f"sm_{arch}" for arch in archs)
            else:
                ext.extra_objects = [obj for isa in ISA_FLAGS for obj in self.compile_rows(isa)]
                super().build_extension(ext)
                self.built[part] = ", ".join(ISA_FLAGS)
        except Exception as error:
            if not ext.optional:
                raise
            self.left_out[part] = " ".join(str(error).split())[:300]
            print(f"fastkd: backend {part!r} is not built: {self.left_out[part]}", file=sys.stderr)

    def compile_rows(self, isa: str) -> list[str]:
        return self.compiler.compile(
            ["csrc/cpu/rows.cpp"],
            output_dir=os.path.join(self.build_temp, isa),
            macros=[("FASTKD_ISA", isa), ("FASTKD_ISA_NAME", f'"{isa}"')],
            extra_postargs=[*FLAGS, *ISA_FLAGS[isa]],
        )

    def build_cuda(self, ext: Extension, archs: list[str]) -> None:
        """Compile and link by nvcc, which knows its own headers and the static runtime; sources side by side."""
        includes = [f"-I{folder}" for folder in (*ext.include_dirs, sysconfig.get_path("include"))]
        flags = ["-std=c++17", "-O3", "-ftz=true", "-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode(archs)]
        # Objects of other flags, or of another nvcc, are not these.
        key = hashlib.sha256(" ".join([*flags, run([NVCC, "--version"])]).encode()).hexdigest()[:16]
        folder = os.path.join(self.build_temp, "cuda", key)
        os.makedirs(folder, exist_ok=True)
        headers = max(os.path.getmtime(path) for path in glob("csrc/*.h") + glob("csrc/cuda/*.*h"))

        def compile_one(source: str) -> str:
            target = os.path.join(folder, os.path.basename(source) + ".o")
            newest = max(headers, os.path.getmtime(source))
            if self.force or not os.path.exists(target) or os.path.getmtime(target) < newest:
                started = time.monotonic()
                run([NVCC, *flags, *includes, "-c", source, "-o", target])
                print(f"fastkd: compiled {source} in {time.monotonic() - started:.0f} s", flush=True)
            return target

        print(f"fastkd: compiling {len(ext.sources)} CUDA sources for sm_{', sm_'.join(archs)}", flush=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        library = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(library), exist_ok=True)
        run([NVCC, "-shared", "-cudart=static", *objects, "-o", library])


def cuda_archs(required: bool) -> list[str]:
    """What to compile the CUDA part for: as asked, or for the GPUs that are here.

    Raises:
        RuntimeError: it is not to be compiled; it says why.
    """
    asked = listed("FASTKD_CUDA_ARCHS")
    if asked == ["none"]:
        raise RuntimeError("FASTKD_CUDA_ARCHS=none declined it")
    if NVCC is None:
        raise RuntimeError("there was no nvcc")
    if asked:
        return [arch.replace(".", "") for arch in asked]
    here = gpus()
    if archs := [arch for arch in here if int(arch) >= int(CUDA_ARCHS[0])]:
        return archs
    if required:
        known = run([NVCC, "--list-gpu-arch"]).split()
        return [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]
    found = f"only a GPU older than sm_{CUDA_ARCHS[0]}, sm_{here[-1]}" if here else "no GPU"
    raise RuntimeError(f"there was {found}, and FASTKD_CUDA_ARCHS named none")


def gpus() -> list[str]:
    """The architectures of this machine's GPUs, by NVIDIA's own tool, which comes with the driver."""
    try:
        capabilities = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    except (OSError, RuntimeError):
        return []
    return sorted({major + minor for major, minor in re.findall(r"^(\d+)\.(\d)$", capabilities, re.MULTILINE)}, key=int)


def gencode(archs: list[str]) -> list[str]:
    """nvcc's options. Machine code for each, and for GPUs to come the newest as PTX.

    Not below 90, though: that PTX has no clusters, which are launched on every GPU from sm_90 on.
    """
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


setup(
    packages=sorted(
        {
            package + inner
            for package, folder in PACKAGE_DIR.items()
            for inner in ("", *(f".{name}" for name in find_packages(folder)))
        }
    ),
    package_dir=PACKAGE_DIR,
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
        Extension("fastkd._cuda", sources=[*sorted(glob("csrc/cuda/*.cu")), "csrc/cuda/binding.cpp"], optional=True),
    ],
    cmdclass={"build_py": BuildPython, "build_ext": BuildOptional},
)
