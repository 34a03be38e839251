"""Verbs of files: show, sites, recipes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rwopt.cli.screen import quiet
from rwopt.errors import UserError

if TYPE_CHECKING:
    from rwopt.schedule import Schedule

_LARGEST = 12  # differences that are listed


def show(args: argparse.Namespace) -> None:
    """`rwopt show FILE`, or `rwopt show FILE OTHER` for what differs."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from rwopt.schedule import Schedule

    schedule = Schedule.load(args.schedule)
    if getattr(args, "other", None):
        show_difference(schedule, Schedule.load(args.other), (args.schedule.stem, args.other.stem), args.png)
        return
    console = Console()
    for name in ("model", "noise", "calibrated", "provenance"):
        about = escape(text(getattr(schedule, name))) or "-"  # escaped: an override may hold [self,ff]
        console.print(f"[bold]{name}[/bold]: {about}", highlight=False)
    table = Table(title=f"{schedule.mode} weights, {schedule.interp} in ln sigma")
    table.add_column("site")
    for sigma in schedule.sigmas:
        table.add_column(f"σ {sigma:.3g}", justify="right")
    for site, row in zip(schedule.sites, schedule.weights.T, strict=True):
        table.add_row(site, *(f"{v:.3f}" for v in row))
    console.print(table)
    if schedule.steps is not None:
        steps = schedule.steps
        calls = Table(title=f"steps: {len(steps)} calls of {steps.sampler}")
        for heading in ("call", "σ", "told σ", "guidance"):
            calls.add_column(heading, justify="right")
        for i, sigma in enumerate(steps.sigmas):
            told = f"{steps.told[i]:.4g}" if steps.told else "-"
            calls.add_row(str(i + 1), f"{sigma:.4g}", told, f"{steps.guidance[i]:.2f}" if steps.guidance else "-")
        console.print(calls)
    if schedule.actions is not None:
        console.print(f"[bold]actions[/bold]: {escape(schedule.actions.text)}", highlight=False)
        if schedule.actions.about:
            console.print(schedule.actions.about, highlight=False)
    if args.png:
        from rwopt.report import schedule_heatmap

        print(schedule_heatmap(schedule, args.png))


def show_difference(a: Schedule, b: Schedule, names: tuple[str, str], png: Path | None) -> None:
    """The largest differences of two schedules by site and level, and with `png` both and their difference."""
    from dataclasses import replace

    import numpy as np
    from rich.console import Console
    from rich.table import Table

    if a.mode != b.mode:
        raise UserError(f"op.mode is {a.mode} in one file and {b.mode} in the other: compare files of one mode")
    common = [site for site in a.sites if site in b.sites]
    if not common:
        raise UserError(f"the files have no site in common ({a.sites[0]} and {b.sites[0]}, ...): compare others")
    levels = np.unique(np.append(a.sigmas, b.sigmas))[::-1]
    both = [s.at(levels)[:, [s.sites.index(site) for site in common]] for s in (a, b)]  # [K, S] each
    first, second = names if names[0] != names[1] else (f"{names[0]} (1)", f"{names[1]} (2)")
    change = both[1] - both[0]
    alone = [f"{len(s.sites) - len(common)} more in {name}" for s, name in ((a, first), (b, second))]
    differ = [name for name in ("interp", "cfg_branch", "steps") if getattr(a, name) != getattr(b, name)]
    console = Console()
    console.print(f"{len(common)} sites in common ({', '.join(alone)}), at the {len(levels)} noise levels of both")
    if differ:
        console.print(f"also different: {', '.join(differ)}")
    if not change.any():
        console.print("all weights are the same")
    else:
        mean = np.abs(change).mean()
        table = Table(title=f"largest differences; the mean of all is {mean:.4g}")
        for heading in ("site", "σ", first, second, "difference"):
            table.add_column(heading, justify="left" if heading == "site" else "right", overflow="fold")
        order = np.argsort(-np.abs(change), axis=None, kind="stable")[:_LARGEST]
        for k, s in zip(*np.unravel_index(order, change.shape), strict=True):
            if change[k, s]:
                values = (both[0][k, s], both[1][k, s])
                table.add_row(common[s], f"{levels[k]:.4g}", *(f"{v:.4g}" for v in values), f"{change[k, s]:+.4g}")
        console.print(table)
    if png:
        from rwopt.report import schedule_heatmap

        drawn = {first: both[0], second: both[1], "1 + difference": 1 + change}
        panels = {
            name: replace(a, sites=tuple(common), sigmas=levels, weights=weights) for name, weights in drawn.items()
        }
        print(schedule_heatmap(panels, png))


def text(value: object) -> str:
    """Mappings as "key value, key (nested)", numbers without noise."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} ({text(v)})" if isinstance(v, Mapping) else f"{k} {text(v)}" for k, v in value.items())
    if isinstance(value, list) and len(value) > 12:
        return f"{len(value)} values, {text(value[0])} to {text(value[-1])}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def sites(args: argparse.Namespace) -> None:
    quiet()
    from rich.console import Console
    from rich.table import Table

    from rwopt.models.configuration import empty_unet
    from rwopt.unet.names import site_rows

    rows = site_rows(empty_unet(args.model))
    console = Console(width=None if sys.stdout.isatty() else 200)
    narrow = ("class", "stage") if console.width < 190 else ()
    columns = [n for n in rows[0] if n not in narrow and any(row[n] for row in rows)]
    table = Table(title=f"{len(rows)} sites of {args.model}, in execution order")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    console.print(table)


def recipes(args: argparse.Namespace) -> None:
    from rwopt import config
    from rwopt.config.groups import groups

    parts = {name.replace("/", "="): about for name, (_, about) in groups().items()}
    whole = {name: about for name, (_, about) in config.recipes().items()}
    width = max(map(len, [*whole, *parts]))
    for name, about in whole.items():
        print(f"{name:<{width}}  {about}")
    print("\nparts, chosen beside a recipe, as in rwopt search recipe=few-steps model=sdxl budget=card-8gb:")
    for name, about in parts.items():
        print(f"{name:<{width}}  {about}")
