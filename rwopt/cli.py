"""The command line: parse, compose the recipe, call one function, print. Heavy imports wait until a verb runs."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rwopt import __version__
from rwopt.errors import UserError

if TYPE_CHECKING:
    from rwopt.tasks.cases import Case

EPILOG = """examples:
  rwopt search recipe=editing                      learn a schedule on the embedded model, compare, report
  rwopt search recipe=editing tuner.trials=80      any key of the recipe can be set
  rwopt search resume=lightning_logs/editing-...   go on after a kill
  rwopt worker lightning_logs/editing-...          help a search that was started with tuner.storage=URL
  rwopt edit --split test --case 3 --schedule schedule.json --out edited.png
  rwopt show schedule.json
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> Parser:
    """The whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = Parser(
        "rwopt",
        description="Learn when and how much each block of a diffusion U-Net should count.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    top.add_argument("--version", action="version", version=f"rwopt {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="verb")

    def verb(name: str, help: str, epilog: str = "") -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=help, description=help, epilog=epilog, formatter_class=raw)

    keys = "keys: run `rwopt search recipe=editing --print` to see them all with their values"
    search = verb("search", "probe, search, validate, compare on test cases, report", keys)
    settings = "recipe=NAME|FILE.yaml, resume=FOLDER, or any key"
    search.add_argument("settings", nargs="*", metavar="key=value", help=settings)
    search.add_argument("--out", type=Path, help="run folder (default lightning_logs/<recipe>-<time>)")
    search.add_argument("--print", action="store_true", help="print the resolved recipe and stop")

    worker = verb("worker", "help a running search with its trials, from another process or machine")
    worker.add_argument("target", help="run folder, or name of a run or study in the storage")
    about = "storage=URL (default: the run folder's own); model.name, model.device, model.dtype where they differ"
    worker.add_argument("settings", nargs="*", metavar="key=value", help=about)
    worker.add_argument("--wait", type=float, default=600.0, help="seconds without work until it gives up (600)")

    probe = verb("probe", "measure how important each site is at each noise level", keys)
    probe.add_argument("settings", nargs="*", metavar="key=value", help="recipe=NAME|FILE.yaml or any key")
    probe.add_argument("--out", type=Path, help="folder for importance.json and probe.png")

    compare = verb("compare", "compare schedule files with the plain model on the test cases of a recipe")
    compare.add_argument("schedules", nargs="+", type=Path, metavar="schedule.json", help="the first meets the others")
    compare.add_argument("--recipe", default="editing", help="whose task, dials and metrics (default editing)")
    compare.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings of the recipe")
    compare.add_argument("--split", default="test", choices=["train", "validation", "test"], help="default test")

    for name, help in (("sample", "make pictures from captions"), ("edit", "edit a picture towards a caption")):
        one = verb(name, f"{help}, with and without a schedule, side by side")
        one.add_argument("--caption", help="target caption (the embedded model knows the words of data/README.md)")
        one.add_argument("--schedule", type=Path, help="schedule file; without it the plain model alone")
        one.add_argument("--model", default="avatars", help="avatars (embedded), a diffusers folder or a hub id")
        one.add_argument("--steps", type=int, help="U-Net calls (default: the schedule's own, else 20)")
        one.add_argument("--guidance", type=float, help="guidance scale (default: the schedule's own, else 4)")
        one.add_argument("--seed", type=int, default=0, help="another number, another start noise (default 0)")
        one.add_argument("--out", type=Path, default=Path(f"{name}.png"), help=f"picture file (default {name}.png)")
        if name == "edit":
            one.add_argument("--image", type=Path, help="source picture; or name a case with --split and --case")
            one.add_argument("--split", default="test", choices=["train", "validation", "test"], help="default test")
            one.add_argument("--case", type=int, default=0, help="number of the embedded case (default 0)")
            one.add_argument("--strength", type=float, help="0 .. 1 (default: the schedule's own, else 0.7)")

    show = verb("show", "print a schedule file: sites, noise levels, weights, where it comes from")
    show.add_argument("schedule", type=Path, metavar="schedule.json", help="schedule file")
    show.add_argument("--png", type=Path, metavar="FILE.png", help="also draw it")

    sites = verb("sites", "list where weights can act on a model, with the names that other tools use")
    sites.add_argument("model", help="avatars, a diffusers folder or a hub id; only its configuration is read")

    verb("recipes", "list the recipes that ship with rwopt")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 on success, 2 with one line on standard error for bad input, 130 when interrupted."""
    args = _parse(arguments)
    try:
        return int(globals()[f"_{args.verb}"](args) or 0)
    except UserError as error:
        print(f"rwopt: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"rwopt: {error.filename}: {error.strerror}: give another path", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rwopt: interrupted; the run folder is whole, go on with resume=<run folder>", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Like `parse_args`, but key=value may also follow the options: argparse takes such words in one place only."""
    top = parser()
    args, rest = top.parse_known_args(arguments)
    settings: list[str] | None = getattr(args, "settings", None)
    if settings is not None:
        settings += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if word not in settings]
    if rest:
        top.error(f"unknown: {' '.join(rest)}")
    return args


def _quiet() -> None:
    """Keep other libraries' start-up chatter off the screen; their errors still show."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _split_settings(items: Sequence[str]) -> tuple[str, str | None, list[str]]:
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


def _search(args: argparse.Namespace) -> None:
    from rwopt import config

    recipe, resume, overrides = _split_settings(args.settings)
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
    _quiet()
    from rich.console import Console

    from rwopt.files import write_text
    from rwopt.progress import Bar
    from rwopt.report import terminal_table
    from rwopt.search.search import Search
    from rwopt.search.verdict import explain, headline

    with Bar() as bar:
        search = Search(settings, folder, bar)
        write_text(folder / "command.txt", command + "\n")
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


def _worker(args: argparse.Namespace) -> None:
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
    _quiet()
    from rwopt import config
    from rwopt.search.worker import join

    done = join(args.target, storage, lambda text: config.parse(text, args.target, overrides), args.wait, _say)
    print(f"{args.target}: has all its trials; {done} of them from here")


def _probe(args: argparse.Namespace) -> None:
    from rwopt import config

    recipe, resume, overrides = _split_settings(args.settings)
    if resume is not None:
        raise UserError(f"resume={resume} is for search: give probe a recipe and --out")
    settings = config.load(recipe or "editing", overrides)
    folder = args.out or Path("lightning_logs") / f"probe-{time.strftime('%Y%m%d-%H%M%S')}"
    _quiet()
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


def _compare(args: argparse.Namespace) -> None:
    from rwopt import config
    from rwopt.schedule import Schedule

    settings = config.load(args.recipe, args.set)
    schedules = [Schedule.load(path) for path in args.schedules]
    _quiet()
    from rich.console import Console

    from rwopt.report import terminal_table
    from rwopt.search.comparison import compare_schedules

    names = [path.stem for path in args.schedules]
    if len({"plain", *names}) <= len(names):
        names = [str(path) for path in args.schedules]
    report = compare_schedules(settings, dict(zip(names, schedules, strict=True)), args.split)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(terminal_table(report, console.width, learned=names[0]))


def _sample(args: argparse.Namespace) -> None:
    if not args.caption:
        raise UserError('sample needs --caption, for example --caption "portrait, pale skin, long red hair"')
    _quiet()
    from rwopt.tasks.cases import Case

    _pictures(args, [Case(f"sample-{args.seed}-{i}", args.caption) for i in range(4)])


def _edit(args: argparse.Namespace) -> None:
    _quiet()
    from rwopt.tasks.cases import Case, load_cases, read_picture

    if args.image is not None:
        if not args.caption:
            raise UserError("edit --image needs --caption, the description of the picture wanted")
        case = Case("own", args.caption, source=read_picture(args.image))
    else:
        cases = load_cases("avatars", args.split, "editing")
        if not 0 <= args.case < len(cases):
            raise UserError(f"--case {args.case} is outside 0 .. {len(cases) - 1} of {args.split}")
        case = cases[args.case]
        if args.caption:
            case.caption, case.truth = args.caption, None
    if args.seed:  # the start noise is a function of the id; seed 0 is the one that searches use
        case.id = f"{case.id}/{args.seed}"
    _pictures(args, [case])


def _pictures(args: argparse.Namespace, cases: Sequence[Case]) -> None:
    from rwopt.report.grid import picture_format
    from rwopt.schedule import Schedule
    from rwopt.search.comparison import pictures

    picture_format(args.out)
    schedule = None if args.schedule is None else Schedule.load(args.schedule)
    strength = getattr(args, "strength", None)
    print(pictures(cases, args.out, schedule, args.model, args.steps, args.guidance, strength, _say))


def _text(value: object) -> str:
    """Mappings as "key value, key (nested)", numbers without noise."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} ({_text(v)})" if isinstance(v, Mapping) else f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list) and len(value) > 12:
        return f"{len(value)} values, {_text(value[0])} to {_text(value[-1])}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _show(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from rwopt.schedule import Schedule

    schedule = Schedule.load(args.schedule)
    console = Console()
    for name in ("model", "noise", "calibrated", "provenance"):
        about = escape(_text(getattr(schedule, name))) or "-"  # escaped: an override may hold [self,ff]
        console.print(f"[bold]{name}[/bold]: {about}", highlight=False)
    table = Table(title=f"{schedule.mode} weights, {schedule.interp} in ln sigma")
    table.add_column("site")
    for sigma in schedule.sigmas:
        table.add_column(f"σ {sigma:.3g}", justify="right")
    for site, row in zip(schedule.sites, schedule.weights.T, strict=True):
        table.add_row(site, *(f"{v:.3f}" for v in row))
    console.print(table)
    if args.png:
        from rwopt.report import schedule_heatmap

        print(schedule_heatmap(schedule, args.png))


def _sites(args: argparse.Namespace) -> None:
    _quiet()
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


def _recipes(args: argparse.Namespace) -> None:
    from rwopt.config import recipes

    width = max(map(len, recipes()), default=0)
    for name, (_, first) in recipes().items():
        print(f"{name:<{width}}  {first}")


if __name__ == "__main__":
    sys.exit(main())
