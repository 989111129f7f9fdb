"""What the layout promises: imports in one direction, names in one place, few environment variables."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastkd import _dispatch, divergences

ROOT = Path(__file__).parent.parent

# From the caller to the kernel. A module imports from later lines only; what needs nothing comes last.
LAYERS = (
    ("__main__",),
    ("demo",),
    ("cache",),
    ("integrations",),
    ("__init__",),
    ("hidden", "teachers", "distributed"),
    ("layers",),
    ("modules",),
    ("functional",),
    ("_dtensor",),
    ("_autograd",),
    ("_op",),
    ("_linear",),
    ("_sparse",),
    ("_slices",),
    ("_dispatch",),
    ("backends",),
    ("kernels",),
    ("divergences", "_labels", "_views", "_version", "_built", "_extras", "_cpu", "_cuda"),
    ("_validate", "_keywords", "_traced"),
    ("_request", "sources"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Folders whose modules may import one another. Those of `backends` share only what begins with an underscore.
FOLDERS = ("kernels", "demo", "cache", "integrations")
SHARED = "backends._"


def sources() -> dict[str, Path]:
    """Every module of the package: its dotted name below ``fastkd``, and its file."""
    found = {path.relative_to(ROOT / "fastkd").with_suffix(""): path for path in (ROOT / "fastkd").rglob("*.py")}
    found |= {path.relative_to(ROOT).with_suffix(""): path for path in (ROOT / "kernels").rglob("*.py")}
    return {".".join(name.parts): path for name, path in found.items()}


SOURCES = sources()


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that this one imports anywhere, as dotted names below ``fastkd``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "fastkd":
                is_module = rest.partition(".")[0] in LEVEL
                yield rest if is_module else "__init__"


def external(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def strings(path: Path) -> Iterator[str]:
    """String literals, docstrings apart."""
    tree = ast.parse(path.read_text())
    documentation = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            documentation.add(id(node.body[0].value))  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def identifiers(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        for field in ("id", "attr", "name", "arg"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


def test_there_are_sources() -> None:
    """The tests below look at something."""
    assert {"functional", "_op", "backends.torch", "backends.triton", "kernels.kd_rows"} <= set(SOURCES)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_one_way(module: str) -> None:
    top = module.partition(".")[0]
    assert top in LEVEL, f"{module}: say in LAYERS where it belongs"
    for imported in imports(SOURCES[module]):
        inside = (top in FOLDERS and imported.startswith(top)) or (top == "backends" and imported.startswith(SHARED))
        assert inside or LEVEL[imported.partition(".")[0]] > LEVEL[top], f"{module} imports {imported}"


def test_integrations_use_what_is_public_and_a_framework_each() -> None:
    """Which nothing else imports."""
    frameworks = {"transformers", "trl", "torchtune", "lightning", "modelopt"}
    for module, path in SOURCES.items():
        top, _, own = module.partition(".")
        if top == "integrations":
            assert all(name == "__init__" or name.startswith("integrations") for name in imports(path)), module
        found = {name.partition(".")[0] for name in external(path)} & frameworks
        assert found <= ({own} if top == "integrations" else set()), module


def test_only_dispatch_names_backends() -> None:
    """Each is a module's name there, and nothing else imports one or asks for one."""
    modules = {name for name in SOURCES if name.startswith("backends.") and not name.startswith(SHARED)}
    assert modules == {f"backends.{name}" for name in _dispatch.NAMES}
    assert any("fastkd.backends" in text for text in strings(SOURCES["_dispatch"]))
    for module, path in SOURCES.items():
        if module != "_dispatch":
            assert not [name for name in imports(path) if name.startswith("backends") and SHARED not in name], module
            assert not [text for text in strings(path) if "fastkd.backends" in text], module
        if module.partition(".")[0] in ("modules", "functional", "_autograd", "_op"):
            assert "triton" not in set(strings(path)), module


def test_only_divergences_names_divergences() -> None:
    """Below it a divergence is a formula and three numbers. The public functions name their default.

    Functors are formulas, not divergences: theirs are the names that Formula has.
    """
    formulas = {"cross_entropy", "total_variation"}
    family = re.compile("forward_?kl|reverse_?kl|jsd|jensen|skew|tvd", re.IGNORECASE)
    for module, path in SOURCES.items():
        top = module.partition(".")[0]
        if top in ("divergences", "__init__", "__main__", "demo", "integrations"):
            continue
        words = set(strings(path)) | set(identifiers(path))
        if module in ("functional", "modules"):
            assert "forward_kl" in words  # the default
            words -= {"forward_kl"}
        assert not [word for word in words if family.search(word)], module
        named = set(divergences.NAMED) - formulas
        assert not named & words, module


def test_t2_and_reductions_stop_at_functional() -> None:
    for module, path in SOURCES.items():
        if module.partition(".")[0] in ("_autograd", "_op", "_dispatch", "backends", "kernels", "divergences"):
            words = set(identifiers(path))
            assert not words & {"reduction", "scale_soft_by_t2", "hard_weight", "soft_weight", "num_items"}, module


def test_at_most_three_environment_variables() -> None:
    """At run time; those of the build are two more. All are documented. TRITON_INTERPRET is Triton's."""
    own, build = (
        set(re.findall(r"\bFASTKD_[A-Z_]+\b", "\n".join(path.read_text() for path in paths)))
        for paths in (SOURCES.values(), (ROOT / "setup.py",))
    )
    assert {"FASTKD_BACKEND", "FASTKD_CHECK_LABELS"} <= own
    assert len(own) <= 3, own
    build -= {"FASTKD_ISA", "FASTKD_ISA_NAME"}  # macros
    assert build == {"FASTKD_CUDA_ARCHS", "FASTKD_REQUIRE"}
    page = (ROOT / "docs" / "install.md").read_text()
    assert all(name in page for name in own | build)
    read = {
        name for path in SOURCES.values() for name in re.findall(r"environ\b[^\"']*[\"'](\w+)[\"']", path.read_text())
    }
    assert read <= own | {"TRITON_INTERPRET"}
