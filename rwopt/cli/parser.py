"""What may be typed: verbs, their arguments, and help for both."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rwopt import __version__
from rwopt.embedded import DEFAULT, FOLDERS
from rwopt.sampling.grids import GRIDS
from rwopt.schedule.samplers import SAMPLERS

MODELS = f"{' or '.join(FOLDERS)} (embedded), a diffusers folder or a hub id"

EPILOG = """examples:
  rwopt search recipe=few-steps                    3 calls that look like 50: learn a schedule, compare, report
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
    search.add_argument("--dry-run", action="store_true", help="say what the run will do and take, and stop")

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
        one.add_argument("--caption", help="target caption (embedded models know the words of data/README.md)")
        one.add_argument("--schedule", type=Path, help="schedule file; without it the plain model alone")
        one.add_argument("--model", default=DEFAULT, help=f"{MODELS} (default {DEFAULT})")
        one.add_argument("--steps", type=int, help="U-Net calls (default: the schedule's own, else 20)")
        one.add_argument("--sampler", choices=list(SAMPLERS), help="default: the schedule's own, else ddim")
        one.add_argument("--grid", help=f"{', '.join(GRIDS)}, or sigmas as 14.6,2.9,0.3 (default trailing)")
        about = "guidance scale (default: the schedule's own, else an embedded model's, else 4)"
        one.add_argument("--guidance", type=float, help=about)
        one.add_argument("--seed", type=int, default=0, help="another number, another start noise (default 0)")
        one.add_argument("--out", type=Path, default=Path(f"{name}.png"), help=f"picture file (default {name}.png)")
        if name == "edit":
            one.add_argument("--image", type=Path, help="source picture; or name a case with --split and --case")
            one.add_argument("--split", default="test", choices=["train", "validation", "test"], help="default test")
            one.add_argument("--case", type=int, default=0, help="number of the case of an embedded model (default 0)")
            one.add_argument("--strength", type=float, help="0 .. 1 (default: the schedule's own, else 0.7)")

    show = verb("show", "print a schedule file: sites, noise levels, weights, where it comes from")
    show.add_argument("schedule", type=Path, metavar="schedule.json", help="schedule file")
    about = "a second file: list what differs"
    show.add_argument("other", nargs="?", type=Path, metavar="other.json", help=about)
    show.add_argument("--png", type=Path, metavar="FILE.png", help="also draw it")

    to = verb("export", "write a schedule for another tool", "targets, and their options: docs/export.md")
    to.add_argument("schedule", type=Path, metavar="schedule.json", help="schedule file")
    to.add_argument("settings", nargs="*", metavar="key=value", help="to=TARGET out=PLACE, and options of the target")
    back = verb("import", "read another tool's weights as a schedule", "kinds, and their options: docs/export.md")
    back.add_argument("source", help="the other tool's file, or its numbers")
    back.add_argument("settings", nargs="*", metavar="key=value", help="out=FILE.json, from=KIND, and options")
    change = verb("edit-schedule", "scale, clamp, window, resample or merge a schedule")
    change.add_argument("schedule", type=Path, metavar="schedule.json", help="schedule file")
    change.add_argument("settings", nargs="*", metavar="key=value", help="scale=0.5, clamp=[0.5,2], out=FILE.json, ...")

    sites = verb("sites", "list where weights can act on a model, with the names that other tools use")
    sites.add_argument("model", help=f"{MODELS}; only its configuration is read")

    about = "measure where the time of a U-Net call goes on this machine, and what each action saves"
    price = verb("cost", about, "what it prints, and how a search uses it: docs/speed.md")
    price.add_argument("model", help=f"{MODELS}; its configuration is read, no weights")
    about = "height and width of pictures in pixels, one number for both (default: the model's own)"
    price.add_argument("--size", type=int, nargs="+", metavar="N", help=about)
    price.add_argument("--batch", type=int, default=1, metavar="N", help="pictures in a call (default 1)")
    about = "one row a picture (default: two, with and without the prompt)"
    price.add_argument("--no-guidance", dest="guidance", action="store_false", help=about)
    formats = ("auto", "float32", "bfloat16", "float16")
    price.add_argument("--dtype", default="auto", choices=formats, help="of the U-Net (default: as in a search)")
    devices = ("auto", "cpu", "cuda")
    price.add_argument("--device", default="auto", choices=devices, help="default: the GPU if there is one")
    price.add_argument("--rounds", type=int, default=7, metavar="N", help="how often each action is timed (default 7)")
    about = "file of all this; a search takes it as speed.cost=FILE.json"
    price.add_argument("--out", type=Path, metavar="FILE.json", help=about)

    one = verb("objectives", "list rewards and metrics, what they need, and what of it is missing here")
    one.add_argument("name", nargs="?", metavar="NAME", help="all about one, also about path/to/file.py:function")

    verb("recipes", "list the recipes that ship with rwopt")
    return top


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
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
