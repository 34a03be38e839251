"""Verbs of recipes: search, worker, probe, compare."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rwopt.cli.screen import quiet, say
from rwopt.errors import UserError


def search(args: argparse.Namespace) -> None:
    from rwopt import config

    recipe, resume, overrides = split_settings(args.settings)
    if resume is not None:
        folder = Path(resume)
        if recipe or overrides:
            raise UserError(f"resume={resume} goes on with its own recipe: leave out {recipe or overrides[0]}")
        if args.out:
            raise UserError(f"resume={resume} goes on in its own folder: leave out --out {args.out}")
        if not (folder / "recipe.yaml").exists():
            raise UserError(f"resume={resume} is no run folder (it has no recipe.yaml): give lightning_logs/<run>")
        settings = config.load(str(folder / "recipe.yaml"))
        command = shlex.join(["rwopt", "search", f"recipe={folder / 'recipe.yaml'}"])
        if (folder / "command.txt").exists():  # else the kill came just before it was written
            command = (folder / "command.txt").read_text().strip()
    else:
        if not recipe:
            raise UserError("no recipe was given: rwopt search recipe=editing (rwopt recipes lists them)")
        settings = config.load(recipe, overrides)
        if settings.tuner.storage:  # a relative path means one place, also for who resumes from another folder
            from rwopt.tuners.storage import absolute_url

            settings.tuner.storage = absolute_url(settings.tuner.storage)
        command = shlex.join(["rwopt", "search", f"recipe={recipe}", *overrides])
        folder = args.out or Path("lightning_logs") / f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    if args.print:
        print(config.to_yaml(settings), end="")
        return
    if resume is None and (folder / "recipe.yaml").exists():
        raise UserError(f"--out {folder} holds a run already: use resume={folder}, or another folder")
    quiet()
    from rich.console import Console

    from rwopt.files import write_text
    from rwopt.progress import Bar, Silent
    from rwopt.report import terminal_table
    from rwopt.search.search import Search
    from rwopt.search.verdict import explain, headline

    if args.dry_run:  # in a folder that goes away again
        import tempfile

        with tempfile.TemporaryDirectory() as place:
            plan = Search(settings, Path(place), Silent()).plan()
        print(*plan.lines, sep="\n")
        plan.check()
        return
    with Bar() as bar:
        search = Search(settings, folder, bar)
        write_text(folder / "command.txt", command + "\n")
        plan = search.plan()
        for line in plan.lines:
            say(line)
        plan.check()
        report = search.run(command)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(terminal_table(report, console.width, metrics=headline(settings)))
    for sentence in (explain(settings), *report.verdict):
        console.print(f"\n{sentence}", highlight=False, markup=False)
    console.print()
    files = {"report.html": "all metrics, pictures, settings", "grid.png": "edits or samples side by side",
             "schedule.json": "the learned schedule: rwopt show, rwopt compare, rwopt.apply(pipe, file)"}  # fmt: skip
    for file, what in files.items():
        console.print(f"{folder / file}  {what}", highlight=False, markup=False, soft_wrap=True)


def worker(args: argparse.Namespace) -> None:
    storage = None
    overrides = []
    for item in args.settings:
        key, sign, value = item.partition("=")
        if key in ("storage", "tuner.storage") and sign:
            storage = value
        else:
            overrides.append(item)
    if storage is not None:
        from rwopt.tuners.storage import absolute_url

        storage = absolute_url(storage)
    for item in overrides:
        if not item.startswith("model."):
            raise UserError(f"{item}: a worker has its study's settings, but for model.name, model.device, model.dtype")
    quiet()
    from rwopt import config
    from rwopt.search.worker import join

    done = join(args.target, storage, lambda text: config.parse(text, args.target, overrides), args.wait, say)
    print(f"{args.target}: has all its trials; {done} of them from here")


def probe(args: argparse.Namespace) -> None:
    from rwopt import config

    recipe, resume, overrides = split_settings(args.settings)
    if resume is not None:
        raise UserError(f"resume={resume} is for search: give probe a recipe and --out")
    settings = config.load(recipe or "editing", overrides)
    folder = args.out or Path("lightning_logs") / f"probe-{time.strftime('%Y%m%d-%H%M%S')}"
    quiet()
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from rwopt.progress import Silent
    from rwopt.report import importance_heatmap
    from rwopt.search.search import Search

    importance = Search(settings, folder, Silent()).probing.importance()
    importance_heatmap(importance, folder / "probe.png")
    table = Table(title=f"{importance.method}: {importance.calls} U-Net calls")
    table.add_column("site")
    for sigma in importance.sigmas:
        table.add_column(f"σ {sigma:.3g}", justify="right")
    for site, row in zip(importance.sites, np.asarray(importance.scores).T, strict=True):
        table.add_row(site, *(f"{v:.4f}" for v in row))
    Console().print(table)
    print(f"{folder / 'importance.json'}\n{folder / 'probe.png'}")


def compare(args: argparse.Namespace) -> None:
    from rwopt import config
    from rwopt.schedule import Schedule

    settings = config.load(args.recipe, args.set)
    schedules = [Schedule.load(path) for path in args.schedules]
    quiet()
    from rich.console import Console

    from rwopt.report import terminal_table
    from rwopt.search.comparison import compare_schedules

    names = [path.stem for path in args.schedules]
    if len({"plain", *names}) <= len(names):
        names = [str(path) for path in args.schedules]
    report = compare_schedules(settings, dict(zip(names, schedules, strict=True)), args.split)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(terminal_table(report, console.width, learned=names[0]))


def split_settings(items: Sequence[str]) -> tuple[str, str | None, list[str]]:
    """(recipe, resume folder, other overrides)."""
    recipe, resume, rest = "", None, []
    for item in items:
        key, _, value = item.partition("=")
        if key == "recipe":
            recipe = value
        elif key == "resume":
            resume = value
        else:
            rest.append(item)
    return recipe, resume, rest
