"""The tables and the curve of `speed.py`, of its result file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rwopt.report.style import BLUE, GREEN, GREY, ORANGE

SOLVER, FEW, PLAN, DIALS, LEARNED = "best solver", "learned few steps", "plan", "plan and dials", "plan and weights"


def markdown(result: dict[str, Any]) -> str:
    """The table of `docs/speed.md`."""
    pairs = {(p["budget"], p["a"], p["b"]): p for p in result["paired"]}
    head = ["time", "method", "priced", "measured", "PSNR to the truth, dB", "to the base's own picture",
            "plan and weights − this, dB", "plan"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for budget in sorted({r["budget"] for r in result["rows"]}, reverse=True):
        rows = [r for r in result["rows"] if r["budget"] == budget]
        for row in sorted(rows, key=lambda r: -r["psnr_converged"]):
            pair = pairs.get((budget, LEARNED, row["method"]))
            gain = f"{pair['mean']:+.2f} [{pair['low']:+.2f}, {pair['high']:+.2f}]" if pair else ""
            plan = row["plan"] if len(row["plan"]) < 40 else row["plan"][:36] + " ..."
            lines.append(
                f"| {budget:g} | {row['method']} | {row['priced_ratio']:.2f} | {row['time_ratio']:.2f} | "
                f"{row['psnr_converged']:.2f} | {row['psnr_20']:.2f} | {gain} | {plan} |"
            )
    cases = result["settings"]["task"]["test"]
    about = f"{cases} test cases; intervals resample cases and seeds. `{result['command']}`"
    return "\n".join([*lines, "", about])


def stage_table(result: dict[str, Any]) -> str:
    """What each stage gains, and what the search takes."""
    lines = ["| time | plans tried | best prediction | chosen | + dials | + weights and dials | calls x pictures | "
             "evolution's calls x pictures | evolution − plan, dB |", "|" + "---|" * 9]  # fmt: skip

    def number(value: float | None, form: str = ".2f") -> str:
        return "" if value is None else f"{value:{form}}"

    for s in result["searches"]:
        best = s["evolution_best"]
        beside = None if best is None else best - s["plan_there"]
        lines.append(
            f"| {s['budget']:g} | {s['proposals']} | {number(s['best prediction'])} | "
            f"{number(s['chosen on validation cases'])} | {number(s['dials'])} | {number(s['weights and dials'])} | "
            f"{s['plan_price']:,} | {number(s['evolution_price'], ',')} | {number(beside, '+.2f')} |"
        )
    return "\n".join([*lines, "", "dB on validation cases; evolution and plan on its own train cases. "
                      f"`{result['command']}`"])


def curve(result: dict[str, Any], path: Path) -> None:
    """Quality against priced time."""
    import matplotlib

    from rwopt.report.style import STYLE, new_figure, save

    with matplotlib.rc_context(STYLE):
        figure = new_figure(7.0, 4.4, layout="constrained")
        axis = figure.add_subplot()
        styles = {SOLVER: ("o-", GREY), FEW: ("s--", GREEN), PLAN: ("^-", ORANGE), LEARNED: ("o-", BLUE)}
        others = [r for r in result["rows"] if r["method"] not in (*styles, DIALS, "plain")]
        axis.plot([r["priced_ratio"] for r in others], [r["psnr_converged"] for r in others], ".", color="#999999",
                  label="published methods")  # fmt: skip
        for name, (marker, color) in styles.items():
            rows = sorted((r["priced_ratio"], r["psnr_converged"]) for r in result["rows"] if r["method"] == name)
            if rows:
                axis.plot(*zip(*rows, strict=True), marker, color=color, label=name)
        axis.set_xlabel("time over that of the plain run")
        axis.set_ylabel("PSNR to the converged picture, dB")
        axis.legend(frameon=False, loc="lower right")
        save(figure, path)
