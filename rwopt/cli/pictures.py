"""Verbs that make pictures: sample, edit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rwopt.cli.screen import quiet, say
from rwopt.embedded import DEFAULT, FOLDERS
from rwopt.errors import UserError

if TYPE_CHECKING:
    from rwopt.tasks import Dials
    from rwopt.tasks.cases import Case


def sample(args: argparse.Namespace) -> None:
    if not args.caption:
        raise UserError('sample needs --caption, for example --caption "portrait, pale skin, long red hair"')
    quiet()
    from rwopt.tasks.cases import Case

    side_by_side(args, [Case(f"sample-{args.seed}-{i}", args.caption) for i in range(4)])


def edit(args: argparse.Namespace) -> None:
    quiet()
    from rwopt.tasks.cases import Case, load_cases, read_picture

    if args.image is not None:
        if not args.caption:
            raise UserError("edit --image needs --caption, the description of the picture wanted")
        case = Case("own", args.caption, source=read_picture(args.image))
    else:
        cases = load_cases(args.model if args.model in FOLDERS else DEFAULT, args.split, "editing")
        if not 0 <= args.case < len(cases):
            raise UserError(f"--case {args.case} is outside 0 .. {len(cases) - 1} of {args.split}")
        case = cases[args.case]
        if args.caption:
            case.caption, case.truth = args.caption, None
    if args.seed:  # the start noise is a function of the id; seed 0 is the one that searches use
        case.id = f"{case.id}/{args.seed}"
    side_by_side(args, [case])


def side_by_side(args: argparse.Namespace, cases: Sequence[Case]) -> None:
    from rwopt.report.grid import picture_format
    from rwopt.schedule import Schedule
    from rwopt.search.comparison import pictures

    picture_format(args.out)
    schedule = None if args.schedule is None else Schedule.load(args.schedule)
    strength = getattr(args, "strength", None)
    dials = args.steps, args.guidance, strength, args.sampler, args.grid
    print(pictures(cases, args.out, schedule, args.model, *dials, say, usual_dials(args.model)))


def usual_dials(model: str) -> Dials:
    """Where neither a file nor the user says: an embedded model's own, from its recipe; else what is usual."""
    from rwopt import config
    from rwopt.search.comparison import USUAL

    if model not in FOLDERS or model == DEFAULT:
        return USUAL
    return replace(USUAL, guidance=config.load("generation", [f"model={model}"]).dials.guidance)
