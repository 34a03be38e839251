"""What long benchmarks have in common: their arguments, the model they are about, and work that processes may share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rwopt.cli.screen import quiet
from rwopt.embedded import DEFAULT, FOLDERS
from rwopt.errors import UserError
from rwopt.files import locked, write_text

ROOT = Path(__file__).resolve().parent


def add_model(parser: argparse.ArgumentParser) -> None:
    about = f"embedded model (default {DEFAULT}); another one has its own run folder, result file and tables"
    parser.add_argument("--model", choices=list(FOLDERS), default=DEFAULT, help=about)


def suffix(model: str) -> str:
    """What the names of everything that belongs to a model end in: nothing for the default, as -emoji for others."""
    return "" if model == DEFAULT else f"-{model}"


def page(model: str, own: str) -> Path:
    """Where its tables stand: the default model's in that page of the docs, another's together in a page of its own."""
    return ROOT.parent / "docs" / (own if model == DEFAULT else f"{model}.md")


def choice(model: str) -> list[str]:
    """The override that chooses a model and its cases in a recipe; recipes have the default by themselves."""
    return [] if model == DEFAULT else [f"model={model}"]


def flag(model: str) -> str:
    """The same on a benchmark's command line."""
    return "" if model == DEFAULT else f" --model {model}"


def command_line(
    name: str, doc: str | None, quick: str, seeds: int, about_seeds: str, models: bool = False
) -> argparse.Namespace:
    """Read the command line of the benchmark `name`; no library says anything from then on.

    quick, seeds, about_seeds: help and default of --quick and --seeds; models: whether it takes --model. Besides what
    may be typed the namespace has `name`, which ends in the model's suffix and in -quick for such a run, `folder`, and
    `file`, where the result belongs.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seeds", type=int, default=seeds, help=about_seeds)
    parser.add_argument("--work", action="store_true", help="only run what is missing, beside other processes")
    parser.add_argument("--table", action="store_true", help="only make the tables again from the result file")
    parser.add_argument("--folder", type=Path, help=f"run folder (default lightning_logs/bench-{name})")
    if models:
        add_model(parser)
    args = parser.parse_args()
    quiet()
    args.name = name + (suffix(args.model) if models else "") + "-quick" * args.quick
    args.folder = args.folder or ROOT.parent / "lightning_logs" / f"bench-{args.name}"
    args.file = ROOT / "results" / f"{args.name}.json"
    return args


def unless_taken(folder: Path, name: str, job: Callable[[], object]) -> None:
    """Do a part of the work in a run folder, unless another process is at it."""
    try:
        with locked(folder / "locks" / name):
            job()
    except UserError as error:
        if "another search" not in str(error):
            raise


class Shared(Protocol):
    """A benchmark whose work processes may share."""

    def work(self) -> None: ...


B = TypeVar("B", bound=Shared)


def result_of(args: argparse.Namespace, bench: B, run: Callable[[B], dict[str, Any]]) -> dict[str, Any] | None:
    """The content of the result file, made by `run` and kept there, or with --table read; None after --work."""
    if args.work:
        bench.work()
        return None
    if args.table:
        return dict(json.loads(args.file.read_text()))
    result = run(bench)
    write_text(args.file, json.dumps(result, indent=1) + "\n")
    return result
