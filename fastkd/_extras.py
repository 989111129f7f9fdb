"""Packages that one command needs and the losses do not: the extras of pyproject.toml."""

from __future__ import annotations

from importlib.util import find_spec

# Where the module's name is another.
MODULES = {"fla-core": "fla", "liger-kernel": "liger_kernel", "quack-kernels": "quack", "scikit-learn": "sklearn"}


def missing(*packages: str) -> str | None:
    """Which of the packages are not installed, and what adds them however fastkd itself was installed; or None."""
    absent = [package for package in packages if find_spec(MODULES.get(package, package)) is None]
    return f"needs {' and '.join(absent)}: pip install {' '.join(absent)}" if absent else None
