"""What the install compiled, as setup.py recorded it beside this module."""

from __future__ import annotations

import json
from pathlib import Path

# Sources that were never installed have no record.
_file = Path(__file__).resolve().with_name("_built.json")
_record = json.loads(_file.read_text()) if _file.exists() else {"built": {}, "left_out": {}}


def targets() -> dict[str, str]:
    """By the name of the part, the processors that it was compiled for."""
    return dict(_record["built"])


def missing(part: str, error: ImportError) -> str:
    """Why a part cannot be imported: what its build said or, if that said nothing, what Python says."""
    return str(_record["left_out"].get(part, error))
