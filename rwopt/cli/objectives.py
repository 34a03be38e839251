"""Verb of objectives: what there is, what each needs, and what is missing here."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from rwopt.cli.screen import quiet, say

if TYPE_CHECKING:
    from rwopt.objectives import ObjectiveSpec


def objectives(args: argparse.Namespace) -> None:
    """A table of all, or everything about one."""
    quiet()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is here, not what could be had: no word with the hub
    from rwopt.objectives.registry import every_spec, missing, objective_spec, plugins

    if args.name:
        spec = objective_spec(args.name)
        for key, value in rows(spec).items():
            print(f"{key + ':':<12}{value}")
        print(f"{'here:':<12}{missing(args.name) or 'ready'}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="objectives; rwopt objectives NAME says all about one")
    specs = every_spec()
    for name in ("name", "better", "range", "gradient", "needs", "weights", "size", "licence", "here"):
        table.add_column(name, overflow="fold", justify="right" if name == "size" else "left")
    for name, spec in specs.items():
        about = rows(spec)
        lacks = missing(name)
        here = "ready" if not lacks else "to fetch" if spec.weights else "to set up"
        if lacks.startswith("pip"):
            here = f"pip install rwopt\\[{spec.extra}]"
        table.add_row(name, *(about[key] for key in ("better", "range", "gradient", "needs", "weights", "size",
                                                     "licence")), here)  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    for point, why in plugins()[1].items():
        say(f"entry point {point} does not load: {why}")


def rows(spec: ObjectiveSpec) -> dict[str, str]:
    """What an objective declares, as text."""
    from rwopt.objectives.weights import in_bytes

    low, high = (f"{end:g}".replace("inf", "∞") for end in spec.range)
    return {
        "name": spec.name,
        "about": spec.about,
        "of": "whole sets, for reports" if spec.level == "set" else "single pictures",
        "better": "higher" if spec.higher_is_better else "lower",
        "range": f"{low} to {high}",
        "gradient": "yes" if spec.differentiable else "no",
        "needs": ", ".join(sorted(spec.needs)) or "-",
        "weights": spec.weights or "-",
        "size": in_bytes(spec.size) if spec.size else "-",
        "licence": spec.licence,
        "sha256": spec.sha256 or "-",
        "extra": spec.extra or "-",
        "version": spec.version,
    }
