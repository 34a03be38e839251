"""The tables and the curve of `few_steps.py`, of its result file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rwopt.report.style import BLUE, GREEN, GREY, ORANGE
from rwopt.search.evaluation import OBJECTIVE

FEATURES = "learned, features"
LABELS = {"dpmpp_2m": "DPM++ 2M", "ddim": "DDIM", "uni_pc": "UniPC"}
METHODS = ("plain", "best solver", "best guidance", "analytic", "constant", "clock", "clock and told", "sampler dials",
           "weights", "weights and clock", "learned", FEATURES)  # fmt: skip
COLUMNS = ((OBJECTIVE, "PSNR, dB", ".2f"), ("teacher.ssim", "SSIM", ".3f"), ("judge.accuracy", "judge accuracy", ".1%"),
           ("judge.realism", "judge realism", ".3f"))  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """The long tables of `docs/few-steps.md`."""
    table = {(r["sampler"], r["calls"], r["method"], r["metric"]): r for r in result["rows"]}
    worths = {(w["sampler"], w["calls"], w["method"]): w for w in result["worth"]}
    pairs = {(p["sampler"], p["calls"], p["b"], p["metric"]): p for p in result["paired"]}
    lines = []
    for sampler in dict.fromkeys(r["sampler"] for r in result["rows"]):
        head = ["calls", "method", "numbers", *(title for _, title, _ in COLUMNS), "learned − this, dB", "worth"]
        lines += [f"**{LABELS[sampler]}**", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for calls in sorted({r["calls"] for r in result["rows"] if r["sampler"] == sampler}):
            for method in METHODS:
                row = table.get((sampler, calls, method, OBJECTIVE))
                if row is None:
                    continue
                cells = [f"{table[sampler, calls, method, name]['mean']:{form}}" for name, _, form in COLUMNS]
                pair = pairs.get((sampler, calls, method, OBJECTIVE))
                gain = "" if pair is None else f"{pair['mean']:+.2f} [{pair['low']:+.2f}, {pair['high']:+.2f}]"
                lines.append(f"| {calls} | {method} | {row['numbers'] or ''} | {' | '.join(cells)} | {gain} | "
                             f"{worth_text(worths[sampler, calls, method])} |")  # fmt: skip
        lines.append("")
    seeds = max(r["seeds"] for r in result["rows"])
    teacher = result["teacher"]
    cases, far = result["settings"]["task"]["test"], [teacher[f"psnr of 50 {s} to 200"] for s in ("dpmpp_2m", "ddim")]
    lines += [
        f"{cases} test cases, up to {seeds} search seeds (the result file has the number of each row); intervals "
        "resample cases and seeds. worth: plain calls of the best sampler and grid that reach the same PSNR. The "
        f"teacher: judge accuracy {teacher['judge.accuracy']:.1%}, realism {teacher['judge.realism']:.3f}; 50 calls of "
        f"DPM++ 2M are {far[0]:.1f} dB from 200, 50 of DDIM {far[1]:.1f} dB. `{result['command']}`"
    ]
    return "\n".join(lines)


def worth_text(row: dict[str, Any]) -> str:
    more = "over " if row["capped"] else ""
    return f"{more}{row['plain_calls']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"


def carry_markdown(result: dict[str, Any]) -> str:
    names = [name for name in result["carry"][0] if name != "use"]
    lines = ["| use | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for row in result["carry"]:
        lines.append(f"| {row['use']} | " + " | ".join(f"{row[name]:.1f}" for name in names) + " |")
    cases, base = 8 if result["quick"] else 48, result["settings"]["dials"]["guidance"]
    about = f"dB to the teacher of that use, {cases} test cases, one file learned at 3 calls of DPM++ 2M, guidance"
    return "\n".join([*lines, "", f"{about} {base:g}. `{result['command']}`"])


def short(result: dict[str, Any]) -> str:
    """What README shows: DPM++ 2M at few calls."""
    table = {(r["calls"], r["method"], r["metric"]): r for r in result["rows"] if r["sampler"] == "dpmpp_2m"}
    worths = {(w["calls"], w["method"]): w for w in result["worth"] if w["sampler"] == "dpmpp_2m"}
    lines = ["| calls | best plain sampler | dials, no weights | learned | like plain calls | judge: plain, learned |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for calls in (2, 3, 4, 6, 10):
        if (calls, "learned", OBJECTIVE) not in table:
            continue
        shown = ("best solver", "sampler dials", "learned")
        cells = [f"{table[calls, name, OBJECTIVE]['mean']:.1f} dB" for name in shown]
        judged = [f"{table[calls, name, 'judge.accuracy']['mean']:.1%}" for name in ("best solver", "learned")]
        same = f"{worths[calls, 'learned']['plain_calls']:.1f}"
        lines.append(f"| {calls} | {' | '.join(cells)} | {same} | {', '.join(judged)} |")
    about = (
        f"PSNR to the plain model's own picture in 50 calls, {result['settings']['task']['test']} test cases; judge: "
        "attributes that a network reads right which no search saw, "
        f"{result['teacher']['judge.accuracy']:.1%} in 50 calls. `{result['command']}`"
    )
    return "\n".join([*lines, "", about])


def curve(result: dict[str, Any], path: Path) -> None:
    """Quality against calls: the best plain sampler and grid, the sampler's dials, everything learned."""
    import matplotlib

    from rwopt.report.style import STYLE, new_figure, save

    with matplotlib.rc_context(STYLE):
        figure = new_figure(7.0, 4.2, layout="constrained")
        _curve(result, figure.add_subplot())
        save(figure, path)


def _curve(result: dict[str, Any], axis: Any) -> None:
    plain = [(p["calls"], p["means"][OBJECTIVE]) for p in result["plain"]]
    axis.plot(*zip(*plain, strict=True), "o-", color=GREY, label="best plain sampler and grid")
    styles = {("dpmpp_2m", "sampler dials"): ("s--", ORANGE, "dials of DPM++ 2M learned, no weights"),
              ("dpmpp_2m", "learned"): ("o-", BLUE, "DPM++ 2M, weights and dials learned"),
              ("ddim", "learned"): ("^:", GREEN, "DDIM, weights and dials learned")}  # fmt: skip
    for (sampler, method), (marker, color, label) in styles.items():
        rows = sorted((r["calls"], r["mean"], r["low"], r["high"]) for r in result["rows"]
                      if (r["sampler"], r["method"], r["metric"]) == (sampler, method, OBJECTIVE))  # fmt: skip
        if rows:
            calls, mean, low, high = (np.array(column) for column in zip(*rows, strict=True))
            axis.errorbar(calls, mean, [mean - low, high - mean], fmt=marker, color=color, label=label, capsize=2)
    axis.set_xlabel("U-Net calls")
    axis.set_ylabel("PSNR to the picture of 50 calls, dB")
    axis.set_xlim(0.5, 16.5)
    axis.legend(frameon=False, loc="lower right")
