"""The benchmark of the integrations counts lines of the documentation."""

from __future__ import annotations

from fastkd.bench import integrations


def test_every_framework_has_a_section_with_marked_lines() -> None:
    found = integrations.lines_changed()
    assert set(found) == set(integrations.FRAMEWORKS)
    assert all(1 <= lines <= 5 for lines in found.values()), found


def test_table() -> None:
    case = {
        "name": "torchtune", "loss_error": 1e-7, "gradient_error": 2e-6, "bytes": {"own": 200, "fastkd": 50},
        "seconds": {"own": [2.0, 4.0, 3.0], "fastkd": [1.5, 1.0, 2.0]},
    }  # fmt: skip
    head, line = integrations.table({"cases": [case]})
    assert len(head) == len(line)
    assert line == ["torchtune", "1", "1e-07", "2e-06", "1.5 s", "0.50", "25% of its own's"]
