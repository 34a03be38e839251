"""What cheap calls save of a run, measured, against what the cost table says: embedded model, true SD1.5 and SDXL.

`python benchmarks/action_cost.py [--quick] [--table]`. A run is 8 calls with guidance: every other call a cut (after
the outermost skip tensor, or after several) or with stored transformers; keys and values of the text made once a run,
not once a call. Then 12 calls against a plan that `recipe=speed` found for half of their time, and against DeepCache's.
Predicted: prices of `rwopt.unet.cost`, and of the text the time of its layers in a call. Measured: processor time of
both runs, call by call in turns; medians. SD1.5 and SDXL (plans alone) have random weights and pictures of 256 x 256.
Finished rows are kept in the run folder. Results: `benchmarks/results/action_cost.json`; the table between markers of
`docs/speed.md`. On a GPU: `benchmarks/gpu.py`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from architectures import POOLED, SD15, XL
from comparison import publish
from sharing import command_line
from torch import Tensor
from turns import Clock, Times, Turn, alike, in_turns, unlike

from rwopt.files import write_text
from rwopt.models import Model, load_model
from rwopt.models.configuration import random_unet
from rwopt.sampling.course import Course, course_by_rule
from rwopt.sampling.denoise import Condition
from rwopt.sampling.sample import sample
from rwopt.schedule.actions import FULL, Action, Actions, by_letters
from rwopt.search.identity import versions
from rwopt.search.speed import arguments
from rwopt.unet.attachment import Attachment
from rwopt.unet.cost import Watch, cost_table
from rwopt.unet.shares import Part, spent

CALLS = 8
STORED = Action("sites", sites=(("transformer", "reuse"),))
MODELS = {"embedded model": (16, 9), "SD1.5": (1, 9), "SDXL": (1, 3)}
"""Pictures of a call, rounds."""
WHOLE = 12
PLANS = {"DeepCache": "F2F2F2F", "a plan of recipe=speed": "FFFhFooFF"}
"""As found for the embedded model at half the time of `WHOLE` calls: `benchmarks/speed.py`."""


def made(name: str, quick: bool) -> Model:
    """A model in bfloat16."""
    if name == "embedded model":
        return load_model("avatars", device="cpu", dtype="bfloat16")
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    config, sizes = SD15, {"block_out_channels": (32, 64, 64, 64)} if quick else {}
    if name == "SDXL":
        config = XL | POOLED
        sizes = {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": (1, 1, 2)} if quick else {}
    with torch.device("meta"):
        empty = UNet2DConditionModel(**{**config, **sizes}, sample_size=32)
    unet = random_unet(empty, "cpu", torch.bfloat16)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")  # type: ignore[no-untyped-call]
    return Model(name, unet, None, None, None, scheduler, torch.device("cpu"))


class Run:
    """One start and condition of a model, sampled with and without actions."""

    def __init__(self, model: Model, pictures: int) -> None:
        self.model, config = model, model.unet.config
        draw = torch.Generator().manual_seed(0)
        text = torch.randn(2, pictures, 77, config.cross_attention_dim, generator=draw)
        shape = (pictures, config.in_channels, config.sample_size, config.sample_size)
        self.x = torch.randn(shape, generator=draw)
        added: dict[str, Tensor] = {}
        if config.addition_embed_type is not None:
            added = {"text_embeds": torch.randn(pictures, 1280, generator=draw), "time_ids": torch.ones(pictures, 6)}
        self.condition = Condition(text[0], text[1], 4.0, added, added)
        self.course: Course = course_by_rule(model, CALLS, "dpmpp_2m")
        self.watch = Watch(model.device)

    @torch.no_grad()
    def seconds(self, hooks: Attachment, way: Way, turn: Turn) -> list[float]:
        """Of each call of a run."""
        course = course_by_rule(self.model, way.calls, "dpmpp_2m")
        actions = None if way.plan is None else Actions.along(course.sigmas, way.plan)
        clock = Clock(self.watch, turn)
        call: Any = hooks if way.texts else _Bare(hooks)
        sample(self.model, call, self.x, self.condition, course, callback=clock, actions=actions)
        return clock.of_calls()

    def times(self, first: Way, second: Way, rounds: int) -> Times:
        with Attachment(self.model.unet, ()) as hooks:
            return in_turns(*(partial(self.seconds, hooks, way) for way in (first, second)), rounds)

    @torch.no_grad()
    def text_share(self, rounds: int) -> float:
        """Time of the text's keys and values over that of a call."""
        unet, text = self.model.unet, Part("in", "cross")
        layers = [getattr(module, name) for path, module in unet.named_modules() if path.endswith("attn2")
                  for name in ("to_k", "to_v")]  # fmt: skip
        parts = {unet: Part("in", "other")} | dict.fromkeys(layers, text)
        shape, rest = arguments(self.model, self.x, self.condition, self.course)
        x, found = torch.randn(*shape, dtype=self.model.dtype), []
        for _ in range(rounds + 1):  # the first call chooses kernels
            sums = spent(parts, lambda: unet(x, 500.0, **rest), self.watch.now, self.watch.seconds)
            found.append(sums[text] / sum(sums.values()))
        return statistics.median(found[1:])


class Way(NamedTuple):
    """Of a run. texts: keys and values of the text once."""

    plan: Sequence[Action] | None = None
    texts: bool = True
    calls: int = CALLS


class _Bare:
    """Calls as an attachment makes them, with nothing to store (`plan_of`)."""

    def __init__(self, hooks: Attachment) -> None:
        self._hooks = hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hooks(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hooks, name)


def rows(name: str, quick: bool, kept: Kept) -> None:
    """Of one model: every row that is not kept yet."""
    pictures, rounds = MODELS[name]
    rounds = 1 if quick else rounds
    cuts = (Action("cut", 1), Action("cut", 3 if name == "embedded model" else 6))
    wanted = {f"{'stored transformers' if a is STORED else f'cut {a.k}'}, every other of {CALLS} calls": a
              for a in (*cuts, STORED) if name != "SDXL"}  # fmt: skip
    text = f"text once in {CALLS} calls, not once a call"
    plans = {f"{who} ({letters}) for {WHOLE} calls": letters for who, letters in PLANS.items()}
    if all((name, what) in kept.known for what in (*wanted, *plans, *([text] if wanted else []))):
        return
    run = Run(made(name, quick), pictures)
    shape, rest = arguments(run.model, run.x, run.condition, run.course)

    def predicted(plan: Sequence[Action], calls: int) -> float:
        asked = [action for action in dict.fromkeys(plan) if action != FULL]
        return cost_table(run.model.unet, shape, rest, True, asked, rounds).price(plan) / calls

    for what, action in wanted.items():
        plan = [FULL, action] * (CALLS // 2)
        both = partial(run.times, Way(plan), Way(), rounds)
        kept.add(name, what, partial(predicted, plan, CALLS), both, alike)
    if wanted:
        both = partial(run.times, Way(), Way(texts=False), rounds)
        kept.add(name, text, lambda: 1 - run.text_share(rounds) * (CALLS - 1) / CALLS, both, alike)
    for what, letters in plans.items():
        plan = by_letters(letters)
        both = partial(run.times, Way(plan, calls=len(plan)), Way(calls=WHOLE), rounds)
        kept.add(name, what, partial(predicted, plan, WHOLE), both, unlike)


class Kept:
    """The rows so far, in a file of the run folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rows.json"
        self.known: dict[tuple[str, str], dict[str, Any]] = {}
        if self.path.exists():
            self.known = {(row["model"], row["what"]): row for row in json.loads(self.path.read_text())}

    def add(self, model: str, what: str, predicted: Callable[[], float], times: Callable[[], Times],
            ratio: Callable[[Times], float]) -> None:  # fmt: skip
        if (model, what) not in self.known:
            row = {"model": model, "what": what, "predicted": predicted(), "measured": ratio(times())}
            self.known[model, what] = row
            write_text(self.path, json.dumps([*self.known.values()], indent=1) + "\n")
            print(row, flush=True)


def markdown(result: dict[str, Any]) -> str:
    lines = ["| model | run | predicted | measured | off |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        off = row["measured"] / row["predicted"] - 1
        lines.append(
            f"| {row['model']} | {row['what']} | {row['predicted']:.3f} | {row['measured']:.3f} | {off:+.1%} |"
        )
    about = "Shares of the time of a run of full calls, one thread, bfloat16."
    return "\n".join([*lines, "", f"{about} `{result['command']}`"])


def main() -> None:
    args = command_line("action_cost", __doc__, "few rounds and a small U-Net, own file", 1, "of no use here")
    if args.table:
        result = json.loads(args.file.read_text())
    else:
        kept = Kept(args.folder)
        for name in MODELS:
            rows(name, args.quick, kept)
        result = {
            "name": "action_cost", "quick": args.quick,
            "command": "python benchmarks/action_cost.py" + " --quick" * args.quick,
            "rows": sorted(kept.known.values(), key=lambda row: [*MODELS].index(row["model"])),
            "threads": torch.get_num_threads(), "versions": versions(),
        }  # fmt: skip
    publish(result, markdown(result), args.file, "speed.md")


if __name__ == "__main__":
    main()
