"""The command line: parse, compose the recipe, call one function, print. Heavy imports wait until a verb runs.

`parser.py`: what may be typed; `runs.py`, `pictures.py`, `files.py`, `objectives.py`, `cost.py`, `exports.py`: the
verbs; `screen.py`: what else is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from rwopt.cli.parser import parse
from rwopt.errors import UserError

VERBS = {
    **{verb: f"runs:{verb}" for verb in ("search", "worker", "probe", "compare")},
    **{verb: f"pictures:{verb}" for verb in ("sample", "edit")},
    **{verb: f"files:{verb}" for verb in ("show", "sites", "recipes")},
    "objectives": "objectives:objectives",
    "cost": "cost:cost",
    "export": "exports:export",
    "import": "exports:read_foreign",
    "edit-schedule": "exports:edit_schedule",
}
"""Where each verb is: module of this package, and function."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 on success, 2 with one line on standard error for bad input, 130 when interrupted."""
    args = parse(arguments)
    try:
        module, _, name = VERBS[args.verb].partition(":")
        return int(getattr(import_module(f"rwopt.cli.{module}"), name)(args) or 0)
    except UserError as error:
        print(f"rwopt: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"rwopt: {UserError(f'{error.filename}: {error.strerror}: give another path')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rwopt: interrupted; the run folder is whole, go on with resume=<run folder>", file=sys.stderr)
        return 130
