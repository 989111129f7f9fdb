"""Figures out of recorded samples: one definition for the terminal, the documentation and the plots."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

HEADERS = ("contender", "time", "with launches", "eager", "GB/s", "floor", "memory", "launches", "first use", "error")
FLOORS = ("copy", "products")
LEGEND = """\
time: median of a call and half the width of the middle half of the samples, contenders in turns; on a GPU its kernels'
alone, all queued before the first begins. with launches: what the host waits for the call. eager: that many times
its speed. GB/s: of the bytes that must be moved. floor: share of the speed of copying as many bytes, or from hidden
states, of the products of matrices alone. memory: peak beyond the inputs. launches: kernels a call. error: against
float64, relative, the larger of value's and gradient's."""


class Figures(NamedTuple):
    """Of one contender on one case; None where it was not measured."""

    status: str
    seconds: float | None = None  # median
    spread: float | None = None  # half of the middle half's width, over the median
    speedup: float | None = None  # eager's time over this
    rate: float | None = None  # bytes a second, counting what must be moved
    of_floor: float | None = None  # the time of the copy, or of the products, over this
    extra: float | None = None  # peak memory beyond the inputs, over the bytes of the inputs
    with_launches: float | None = None  # median
    launches: int | None = None
    first_use: float | None = None
    error: float | None = None  # the larger of value's and gradient's


def figures(case: dict[str, Any]) -> dict[str, Figures]:
    medians = {name: statistics.median(c["seconds"]) for name, c in case["contenders"].items() if "seconds" in c}
    found = {}
    for name, contender in case["contenders"].items():
        if name not in medians:
            found[name] = Figures(contender["status"])
            continue
        seconds, samples = medians[name], contender["seconds"]
        low, _, high = quartiles(samples)
        ratio = {other: medians[other] / seconds if other in medians else None for other in ("eager", *FLOORS)}
        errors = [error for error in contender.get("error", {}).values() if error is not None]
        found[name] = Figures(
            contender["status"], seconds, (high - low) / 2 / seconds, ratio["eager"], case["bytes"] / seconds,
            ratio["copy"] or ratio["products"], contender.get("peak_bytes"),
            statistics.median(contender["with_launches"]) if "with_launches" in contender else None,
            contender.get("launches"), contender["first_use"],
            max(errors, default=None),
        )  # fmt: skip
    return found


def quartiles(samples: list[float]) -> list[float]:
    """Within the samples: by default ``quantiles`` guesses beyond them, and with few guesses far."""
    return statistics.quantiles(samples, n=4, method="inclusive")


def cells(name: str, f: Figures) -> list[str]:
    """A line of the table, as in :data:`HEADERS`, of what was timed."""
    assert f.seconds and f.spread is not None and f.rate
    return [
        name,
        f"{duration(f.seconds)} ± {f.spread:.0%}",
        duration(f.with_launches) if f.with_launches else "",
        f"{f.speedup:.2f} x" if f.speedup and name not in FLOORS else "",
        f"{f.rate / 1e9:.1f}",
        f"{f.of_floor:.0%}" if f.of_floor else "",
        f"{f.extra / 2**20:.0f} MiB" if f.extra is not None else "",
        "" if f.launches is None else str(f.launches),
        duration(f.first_use) if f.first_use else "",
        "" if f.error is None else f"{f.error:.0e}" + (" WRONG" if f.status == "wrong" else ""),
    ]


def table(case: dict[str, Any]) -> tuple[list[list[str]], str]:
    """(the header and a line for each contender that was timed, without empty columns; why the others were not)."""
    found = figures(case)
    lines = [list(HEADERS), *(cells(name, f) for name, f in found.items() if f.seconds)]
    absent = "; ".join(f"{name}: {f.status}" for name, f in found.items() if not f.seconds)
    return without_empty_columns(lines), absent


def without_empty_columns(lines: list[list[str]]) -> list[list[str]]:
    """Of a header and lines: the columns in which any line says something."""
    kept = [column for column in zip(*lines, strict=True) if any(column[1:])]
    return [list(line) for line in zip(*kept, strict=True)]


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def machine_line(machine: dict[str, Any]) -> str:
    versions = " · ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    commit = f" · commit {machine['commit']}" if machine["commit"] else ""
    threads = f", {machine['threads']} threads" if machine["kind"] == "cpu" else f", CUDA {machine['cuda']}"
    return f"{machine['device']}{threads} · Python {machine['python']} · {versions}{commit}"


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, float, bool]]:
    """(case, contender, time before over time after, whether that is beyond the noise) for what both runs have.

    Beyond the noise: the middle halves of the two samples do not overlap.
    """
    found = []
    old_cases = {case["name"]: case["contenders"] for case in before["cases"]}
    for case in after["cases"]:
        for name, contender in case["contenders"].items():
            old = old_cases.get(case["name"], {}).get(name, {})
            if "seconds" in contender and "seconds" in old:
                was, now = (quartiles(c["seconds"]) for c in (old, contender))
                found.append((case["name"], name, was[1] / now[1], now[2] < was[0] or was[2] < now[0]))
    return found
