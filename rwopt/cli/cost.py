"""Verb of costs: where the time of a U-Net call goes on this machine, and what each action saves."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rwopt.cli.screen import quiet, say
from rwopt.errors import UserError, check

if TYPE_CHECKING:
    from rwopt.models.call_shape import CallShape
    from rwopt.schedule.actions import Action
    from rwopt.unet.cost import CostTable
    from rwopt.unet.shares import Share

_BRANCHES = {"transformer": "transformers", "self": "self-attention", "cross": "cross-attention", "ff": "feed-forward",
             "resnet": "the branches of resnets"}  # fmt: skip


def cost(args: argparse.Namespace) -> None:
    """`rwopt cost MODEL`: two tables, and a file of both for `speed.cost`."""
    quiet()
    from rwopt.files import write_text
    from rwopt.models.call_shape import call_shape
    from rwopt.models.configuration import empty_unet
    from rwopt.models.formats import device_of, unet_format_of
    from rwopt.unet.cost import standard_actions

    check(args.rounds >= 1, "--rounds", args.rounds, "give how often each action is timed, 1 or more")
    device = device_of(args.device, "--device")
    if args.out:
        if args.out.is_dir():
            raise UserError(f"--out {args.out} is a folder: name a file in it, as {args.out / 'cost.json'}")
        args.out.parent.mkdir(parents=True, exist_ok=True)
    empty = empty_unet(args.model)
    shape = call_shape(args.model, empty, args.size, args.batch, args.guidance)
    actions = standard_actions(empty, shape.guided)
    try:
        table, parts = _measured(args, empty, shape, actions, device, unet_format_of(args.dtype, device))
    except RuntimeError as error:  # PyTorch has no class of its own for a processor's memory
        if "allocate memory" not in str(error) and type(error).__name__ != "OutOfMemoryError":
            raise
        raise UserError(f"a call of {args.model} does not fit into memory: give a smaller --size or --batch") from None
    if args.out:
        document = {"model": args.model, **table.to_json(), "shares": [part.to_json() for part in parts]}
        write_text(args.out, json.dumps(document, indent=1) + "\n")
    show(args.model, shape, table, parts, actions, args.rounds)
    if args.out:
        print(f"{args.out}  for a search: speed.cost={args.out}")


def _measured(
    args: argparse.Namespace, empty: Any, shape: CallShape, actions: Sequence[Action], device: str, dtype: Any
) -> tuple[CostTable, tuple[Share, ...]]:
    from rwopt.models.configuration import random_unet
    from rwopt.models.loading import suit
    from rwopt.unet.cost import cost_table
    from rwopt.unet.example import example_inputs, keywords
    from rwopt.unet.shares import shares

    unet = random_unet(empty, device, dtype)
    suit(unet, args.model, device)
    inputs = example_inputs(unet.config, (shape.height, shape.width), shape.rows, shape.tokens)
    x, rest = inputs["sample"].shape, keywords(inputs, next(unet.parameters()))
    begin = time.perf_counter()
    parts = shares(unet, x, rest, args.rounds)
    each = (time.perf_counter() - begin) / (args.rounds + 2)
    calls = len(actions) * (4 + 1.5 * args.rounds)  # half of the timed ones are full
    say(f"{len(actions)} actions, each timed {args.rounds} times beside a full call: about {_duration(calls * each)}")
    return cost_table(unet, x, rest, shape.guided, actions, args.rounds), parts


def _duration(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} min"


def show(
    model: str, shape: CallShape, table: CostTable, parts: Sequence[Share], actions: Sequence[Action], rounds: int
) -> None:
    """Print what was measured, and where."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    rows, (height, width) = f"{shape.rows} row{'s' * (shape.rows > 1)}", shape.picture
    kind = "with guidance" if shape.guided else "without guidance"
    spent = "of the device" if table.device.startswith("cuda") else "of the processor"
    threads = f"{table.threads} thread{'s' * (table.threads > 1)}"
    times = f"{rounds} round{'s' * (rounds > 1)}"
    for line in (
        f"{model}: a full call of {rows} ({kind}) for pictures of {height} x {width}",
        f"{table.seconds:.3g} s {spent}, {table.multiply_adds / 1e9:.3g} G multiply-adds",
        f"measured on {_machine(table.device)}, {table.dtype}, {threads}; medians of {times}",
        "weights are random: the time of a call does not depend on them",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(_share_table(parts))
    console.print(_action_table(table, actions))


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    return f"{device} ({platform.processor() or platform.machine()})"


def _share_table(parts: Sequence[Share]) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    from rwopt.unet.shares import KINDS

    kinds = [kind for kind in KINDS if any(part.kind == kind for part in parts)]
    places = list(dict.fromkeys(part.place for part in parts))
    title = "where a full call goes, in %: multiply-adds / time"
    table = Table(title=title, box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("place", no_wrap=True)
    for kind in (*kinds, "all"):
        table.add_column(kind, justify="right")

    def cell(place: str | None, kind: str | None) -> str:
        found = [p for p in parts if place in (None, p.place) and kind in (None, p.kind)]
        if not found:
            return ""
        both = (100 * sum(p.operations for p in found), 100 * sum(p.time for p in found))
        return " / ".join(f"{x:.1f}" if x < 99.95 else "100" for x in both)

    for place in places:
        table.add_row(place, *(cell(place, kind) for kind in (*kinds, None)), end_section=place == places[-1])
    table.add_row("all", *(cell(None, kind) for kind in (*kinds, None)))
    return table


def _action_table(costs: CostTable, actions: Sequence[Action]) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    from rwopt.schedule.actions import FULL, Action

    table = Table(title="what a call of each action takes, in full calls", box=SIMPLE, pad_edge=False)
    for name in ("letters", "what is computed", "multiply-adds", "time"):
        table.add_column(name, justify="right" if name in ("multiply-adds", "time") else "left")
    known = {FULL: 1.0, Action("output"): 0.0}
    for action in (FULL, *actions, Action("output")):
        operations = known[action] if action in known else costs.operations[action.letter]
        table.add_row(_letters(action), _words(action), f"{operations:.3f}", f"{costs.of(action):.3f}")
    return table


def _letters(action: Action) -> str:
    """Those of `speed.actions`: with the stored value, and with the line through two; none for what has no letter."""
    line = tuple((name, "extrapolate") for name, _ in action.sites)
    both = (action, replace(action, order=1) if action.place else replace(action, sites=line))
    return " ".join(dict.fromkeys(each.letter for each in both if len(each.letter) == 1))


def _words(action: Action) -> str:
    if action.kind == "sites":
        return f"all but {', '.join(_BRANCHES[name] for name, _ in action.sites)}"
    if action.kind == "cut":
        return f"{action.k} outermost skip tensor{'s' * (action.k > 1)} and the up layers behind"
    return {
        "full": "everything",
        "guidance": "the rows with the prompt",
        "encoder": "middle and up blocks",
        "output": "nothing: the output is that of earlier calls",
    }[action.kind]
