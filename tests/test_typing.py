"""What a user's type checker sees, in ``users_program.py``, and that the keywords it knows are the functions'."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import fastkd
from fastkd import functional
from tests import smoke


def test_a_users_program(pytestconfig: pytest.Config) -> None:
    package = Path(fastkd.__file__).parent
    assert (package / "py.typed").exists()
    assert pytestconfig.cache is not None
    smoke.types(MYPYPATH=str(package.parent), MYPY_CACHE_DIR=str(pytestconfig.cache.mkdir("mypy")))


def test_the_typed_keywords_are_the_functions() -> None:
    """The overloads name them by way of a TypedDict, with the types of the signature."""
    keywords = {
        name: parameter.annotation
        for name, parameter in inspect.signature(fastkd.kd_loss).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    del keywords["return_parts"]
    typed = {name: given.__forward_arg__ for name, given in functional._Keywords.__annotations__.items()}
    assert typed == keywords
    settings = set(inspect.signature(fastkd.KDLoss).parameters) - {"return_parts"}
    assert set(functional.Settings.__annotations__) == settings
