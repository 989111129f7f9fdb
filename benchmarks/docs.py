"""Write the recorded figures into the documentation: ``python -m fastkd.bench.docs``.

Between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->`` stands what :func:`blocks` gives for NAME, out of the
JSON files in ``benchmarks/results/``: measured times, and instructions counted for the cost model; or computed here, if
it is the same everywhere. Nothing there is typed by hand, and a test compares.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from fastkd.bench import accuracy, builds, cache, cost, cost_triton, integrations, normalisation, slices, summary, tails

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)(<!-- end of figures -->)", re.DOTALL)
OTHERS = ("eager", "torch.compile", "Liger")
MISSING = "Not measured yet.\n"


def blocks() -> dict[str, str]:
    """The text of each block: the short table and the full ones, by kind of device."""
    texts = {}
    for kind in ("cpu", "cuda"):
        runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{kind}-*.json"))]
        texts[f"{kind}_short"] = "\n".join(map(short, runs)) or MISSING
        texts[f"{kind}_full"] = "\n".join(map(full, runs)) or MISSING
    digits = json.loads((RESULTS / "accuracy.json").read_text())
    for name, lines in zip(("accuracy", "rounding"), accuracy.tables(digits), strict=True):
        texts[name] = measured(digits, lines)
    for module in (cache, integrations, tails):
        name = module.__name__.rpartition(".")[2]
        recorded = json.loads((RESULTS / f"{name}.json").read_text())
        texts[name] = measured(recorded, module.table(recorded))
    texts["layers"] = layers_learned(json.loads((RESULTS / "demo-layers.json").read_text()))
    texts["normalisation"] = table(normalisation.table())
    sliced = json.loads((RESULTS / "slices.json").read_text())
    texts["slices"] = measured(sliced, *slices.tables(sliced))
    compared = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("builds-*.json"))]
    texts["builds"] = "\n".join(map(of_builds, compared)) or MISSING
    predicted = cost_triton.table(cost_triton.recorded())
    texts["cost_triton"] = f"**Predicted, not measured:** ms of {cost.ROWS} rows\n\n{table(predicted)}"
    fills = cost.fills_table(cost.recorded())
    texts["cost_fills"] = f"**Counted, not measured:** rows of 128256 columns\n\n{table(fills)}"
    texts["cost"] = f"**Predicted, not measured:** ms of {cost.ROWS} rows\n\n{table(cost.table(cost.recorded()))}"
    return texts


def short(results: dict[str, Any]) -> str:
    """A line for each case and backend: its time, and its speed against the others'."""
    lines = [["case", "backend", "time", *(f"x {other}" for other in OTHERS), "of the floor's speed"]]
    for case in results["cases"]:
        found = summary.figures(case)
        ours = [(name, f) for name, f in found.items() if name.startswith("fastkd ") and f.seconds]
        for name, f in sorted(ours, key=lambda item: item[1].seconds):
            others = [found[other].seconds if other in found else None for other in OTHERS]
            ratios = [f"{seconds / f.seconds:.2f}" if seconds else "" for seconds in others]
            time, share = summary.duration(f.seconds), f"{f.of_floor:.0%}"
            lines.append([case["name"], f"`{name.split()[1]}`", time, *ratios, share])
    return measured(results, summary.without_empty_columns(lines))


def full(results: dict[str, Any]) -> str:
    parts = [f"### {results['machine']['device']}\n\n{summary.machine_line(results['machine'])}\n"]
    said = ""
    for case in results["cases"]:
        lines, absent = summary.table(case)
        parts.append(f"\n**{case['name']}**\n\n{table(lines)}")
        if absent != said:  # mostly the same for all cases
            parts.append(f"\nNot run: {absent}.\n")
            said = absent
    return "".join(parts)


def layers_learned(results: dict[str, Any]) -> str:
    """Held-out losses of the demo's layers task."""
    versions = " · ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [["", "held-out loss, nats a token: mean", "of the seeds"]]
    for name, runs in {"(the teacher)": [results["teacher"]], **results["students"]}.items():
        finals = [list(found["held_out"].values())[-1] for found in runs]
        span = f"{min(finals):.3f} to {max(finals):.3f}" if len(finals) > 1 else ""
        lines.append([name, f"{statistics.mean(finals):.3f}", span])
    return f"{results['device']} · {versions}\n\n{table(lines)}"


def of_builds(results: dict[str, Any]) -> str:
    return (
        f"{summary.machine_line(results['machine'])}; the other build: commit {results['other']}\n\n"
        f"{table(builds.table(results))}"
    )


def measured(results: dict[str, Any], *tables: list[list[str]]) -> str:
    """Tables of results, under the machine that they are of."""
    return "\n".join([f"{summary.machine_line(results['machine'])}\n", *map(table, tables)])


def table(lines: list[list[str]]) -> str:
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]]) + "\n"


def render(text: str) -> str:
    """A page with its blocks as the results have them."""
    found = blocks()
    return BLOCK.sub(lambda match: f"{match[1]}{found[match[2]]}{match[4]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text()))
