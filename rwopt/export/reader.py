"""Reads a schedule file (1.x) and gives weights at noise levels; the standard library alone, no rwopt.

Exports carry this file's text as it is (`source`), so it imports nothing of the package and runs on Python 3.10. The
rules are those of `rwopt.Schedule`: levels are VE sigmas, between knots ln sigma counts, outside the outermost rows
hold. Any file gives a table or a `ValueError` of one line, in bounded time and memory.
"""

from __future__ import annotations

import bisect
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

LIMIT, BIG, MOST = 2_000_000, 1e30, 1e300  # bytes of a file; weights and levels are smaller
KNOT, SAME = 1e-3, 1e-2  # in ln sigma: files round their knots; nearer levels are one call of a sampler
WORDS = {"mode": ("residual", "output"), "cfg_branch": ("both", "cond", "uncond"),
         "interp": ("linear", "nearest", "previous")}  # fmt: skip


def source() -> str:  # this text
    return Path(__file__).read_text(encoding="utf-8")


def need(ok: Any, message: str) -> None:
    if not ok:
        raise ValueError(message)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    need(len(made := dict(pairs)) == len(pairs), "an entry comes twice")
    return made


def word(part: dict[str, Any], name: str) -> Any:
    value = part.get(name, WORDS[name][0])
    need(value in WORDS[name], f"{name} is none of {', '.join(WORDS[name])}")
    return value


def numbers(values: Any, name: str, low: float, high: float, falling: bool = False) -> list[float]:  # low < x < high
    need(isinstance(values, list) and values, f"{name} is no list of numbers")
    for i, x in enumerate(values):
        sound = type(x) in (int, float) and low < x < high and not (falling and i and x >= values[i - 1])
        need(sound, f"{name}[{i}] is {str(x)[:40]!r}" if not sound else "")
    return [float(x) for x in values]


class Table:
    """sites [S]; sigmas [K], falling; weights [K][S]; mode: residual (x + w f(x)) or output (w (x + f(x))); interp;
    cfg_branch: both, cond or uncond; steps: None, or the file's {"sampler", "sigmas", "told", "guidance"}; noise."""
    def __init__(self, document: Any) -> None:
        need(isinstance(document, dict) and document.get("format") == "rwopt.schedule", "no rwopt schedule")
        need(re.fullmatch(r"1\.\d+", str(document.get("version"))[:9]), "a schedule of another version than 1.x")
        op, grid, rows, steps = (document.get(name) for name in ("op", "grid", "weights", "steps"))
        sites, self.noise, op = document.get("sites"), document.get("noise", {}), op or {}
        parts = (op, grid, self.noise, {} if steps is None else steps)
        need(all(isinstance(part, dict) for part in parts), "op, grid, noise and steps are objects")
        need(isinstance(sites, list) and all(isinstance(site, dict) for site in sites), "sites is no list of objects")
        self.sites = [str(site.get("id")) for site in sites]
        need(sites and len(set(self.sites)) == len(sites), "sites is empty, or names one twice")
        self.sigmas = numbers(grid.get("sigma"), "grid.sigma", 0, MOST, falling=True)
        need(isinstance(rows, list) and len(rows) == len(self.sigmas), "weights has not one row a sigma")
        self.weights = [numbers(row, f"weights[{k}]", -BIG, BIG) for k, row in enumerate(rows)]
        need(all(len(row) == len(sites) for row in rows), "weights has not one column a site")
        self.mode, self.cfg_branch, self.interp = word(op, "mode"), word(op, "cfg_branch"), word(grid, "interp")
        self.steps: dict[str, Any] | None = steps
        for name, low in () if steps is None else (("sigmas", 0), ("told", 0), ("guidance", 1)):
            if name in steps or name == "sigmas":
                calls = numbers(steps.get(name), f"steps.{name}", low, MOST, falling=name == "sigmas")
                need(len(calls) == len(steps["sigmas"]), f"steps.{name} has not one number a call")
        self._knots = [-math.log(sigma) for sigma in self.sigmas]

    def at(self, sigma: float, strength: float = 1.0, high: float = math.inf, low: float = 0.0) -> list[float]:
        """Weights [S] at VE `sigma`, scaled towards 1 by `strength`; 1 unless low < sigma <= high."""
        need(not math.isnan(sigma), "sigma is NaN")
        if sigma > high * math.exp(KNOT) or (low > 0 and sigma <= low * math.exp(KNOT)):  # `low` itself is outside
            return [1.0] * len(self.sites)
        x, knots = -math.log(min(max(sigma, self.sigmas[-1]), self.sigmas[0])), self._knots
        k = max(bisect.bisect_right(knots, x + (KNOT if self.interp == "previous" else 0.0)) - 1, 0)
        if self.interp == "nearest":
            k = min(range(len(knots)), key=lambda k: abs(x - knots[k]))
        row = self.weights[k]
        if self.interp == "linear" and k + 1 < len(knots):
            share = min(max((x - knots[k]) / (knots[k + 1] - knots[k]), 0.0), 1.0)
            row = [a + share * (b - a) for a, b in zip(row, self.weights[k + 1], strict=True)]
        return list(row) if strength == 1 else [1 + strength * (w - 1) for w in row]

    def dials(self, sigma: float) -> dict[str, float]:
        """"told" and "guidance" of the call at `sigma`, as far as the file has them; {} at a level of no call."""
        apart = [abs(math.log(sigma) - math.log(level)) for level in (self.steps or {}).get("sigmas", []) if sigma > 0]
        call = min(range(len(apart)), key=apart.__getitem__, default=-1)
        if self.steps is None or call < 0 or apart[call] > SAME:
            return {}
        return {name: self.steps[name][call] for name in ("told", "guidance") if name in self.steps}


def window(start: float, end: float, sigmas: list[float]) -> tuple[float, float]:
    """(high, low) for `Table.at`: calls i of N, at levels `sigmas` [N], falling, with start <= i / N < end."""
    calls = [math.inf, *(s for s in sigmas if s > 0), 0.0]
    need(len(calls) > 2 and 0 <= start <= end <= 1, "a window needs 0 <= start <= end <= 1 and noise levels")
    edges = [math.sqrt(a * b) if b else 0.0 for a, b in pairwise(calls)]  # infinity, between calls, 0
    return edges[math.ceil(round(start * len(edges[1:]), 9))], edges[math.ceil(round(end * len(edges[1:]), 9))]


def parse(text: str | bytes) -> Table:
    """The table of a schedule file's content. ValueError if it is none."""
    need(len(text) <= LIMIT, f"longer than {LIMIT} bytes")
    try:
        return Table(json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"), object_pairs_hook=unique))
    except RecursionError:
        raise ValueError("nested too deep") from None


def load(path: str | Path) -> Table:  # the same of a file; OSError if it cannot be read
    with Path(path).open("rb") as file:
        return parse(file.read(LIMIT + 1))
