"""What cheap calls save of a whole run, measured, against what the cost table says: embedded model and true SD1.5.

`python benchmarks/action_cost.py [--quick] [--table]`. A run is 8 calls with guidance: every other call a cut (after
the outermost skip tensor, or after several) or with stored transformers; keys and values of the text made once a run,
not once a call. Predicted: prices of `rwopt.unet.cost`, and of the text the time of its layers in a call. Measured:
processor time of both runs, call by call in turns; medians.
SD1.5 has random weights and pictures of 256 x 256. Results: `benchmarks/results/action_cost.json`; the table between
markers of `docs/speed.md`. On a GPU: `benchmarks/gpu.py`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Semaphore
from typing import Any, NamedTuple

import torch
from architectures import SD15
from comparison import publish
from sharing import command_line
from torch import Tensor

from rwopt.models import Model, load_model
from rwopt.models.configuration import random_unet
from rwopt.sampling.course import Course, course_by_rule
from rwopt.sampling.denoise import Condition
from rwopt.sampling.sample import sample
from rwopt.schedule.actions import FULL, Action, Actions
from rwopt.search.identity import versions
from rwopt.search.speed import arguments
from rwopt.unet.attachment import Attachment
from rwopt.unet.cost import Watch, cost_table
from rwopt.unet.shares import Part, spent

CALLS = 8
STORED = Action("sites", sites=(("transformer", "reuse"),))
MODELS = {"embedded model": 16, "SD1.5": 1}
"""Pictures of a call."""


def made(name: str, quick: bool) -> Model:
    """A model in bfloat16."""
    if name == "embedded model":
        return load_model("avatars", device="cpu", dtype="bfloat16")
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 64, 64, 64)} if quick else {}
    with torch.device("meta"):
        empty = UNet2DConditionModel(**SD15, **sizes, sample_size=32)
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
        self.condition = Condition(text[0], text[1], 4.0)
        self.course: Course = course_by_rule(model, CALLS, "dpmpp_2m")
        self.watch = Watch(model.device)

    @torch.no_grad()
    def seconds(self, hooks: Attachment, way: Way, turn: Turn) -> list[float]:
        """Of each call of a run."""
        actions = None if way.plan is None else Actions.along(self.course.sigmas, way.plan)
        marks, begin = [], self.watch.now()

        def step(i: int, x: Tensor) -> None:
            nonlocal begin
            if i:  # a call is done
                marks.append(self.watch.seconds(begin, self.watch.now()))
                turn.pass_on()
            begin = self.watch.now()

        call: Any = hooks if way.texts else _Bare(hooks)
        x = sample(self.model, call, self.x, self.condition, self.course, callback=step, actions=actions)
        step(len(self.course), x)
        return marks

    def ratio(self, cheap: Way, whole: Way, rounds: int) -> float:
        """Of the times of two runs, call by call in turns, so that both meet what else the machine does: of each call
        the median over the rounds, and their mean."""
        found = []
        with Attachment(self.model.unet, ()) as hooks, ThreadPoolExecutor(2) as pool:
            for _ in range(rounds + 1):  # the first chooses kernels
                runs = [pool.submit(turn.take, partial(self.seconds, hooks, way))
                        for turn, way in zip(Turn.two(), (cheap, whole), strict=True)]  # fmt: skip
                found.append([a / b for a, b in zip(*(run.result() for run in runs), strict=True)])
        return statistics.mean(map(statistics.median, zip(*found[1:], strict=True)))

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

    plan: list[Action] | None = None
    texts: bool = True


class Turn:
    """Of two threads, one of which works at a time."""

    def __init__(self) -> None:
        self._free = Semaphore(0)
        self.other = self

    @classmethod
    def two(cls) -> tuple[Turn, Turn]:
        first, second = cls(), cls()
        first.other, second.other = second, first
        first._free.release()
        return first, second

    def take(self, work: Callable[[Turn], list[float]]) -> list[float]:
        self._free.acquire()
        try:
            return work(self)
        finally:
            self.other._free.release(CALLS + 1)  # also after an error

    def pass_on(self) -> None:
        self.other._free.release()
        self._free.acquire()


class _Bare:
    """Calls as an attachment makes them, with nothing to store (`plan_of`)."""

    def __init__(self, hooks: Attachment) -> None:
        self._hooks = hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hooks(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hooks, name)


def rows(name: str, quick: bool) -> list[dict[str, Any]]:
    run, rounds = Run(made(name, quick), MODELS[name]), 1 if quick else 9
    shape, rest = arguments(run.model, run.x, run.condition, run.course)
    cuts = (Action("cut", 1), Action("cut", 3 if name == "embedded model" else 6))
    table = cost_table(run.model.unet, shape, rest, True, (*cuts, STORED), rounds)
    out = []
    for action in (*cuts, STORED):
        plan = [FULL, action] * (CALLS // 2)
        predicted = table.price(plan) / CALLS
        found = run.ratio(Way(plan), Way(), rounds)
        what = "stored transformers" if action is STORED else f"cut {action.k}"
        out.append({"model": name, "what": f"{what}, every other call", "predicted": predicted, "measured": found})
    share = run.text_share(rounds)
    found = run.ratio(Way(), Way(texts=False), rounds)
    predicted = 1 - share * (CALLS - 1) / CALLS
    return [*out, {"model": name, "what": "text once a run", "predicted": predicted, "measured": found}]


def markdown(result: dict[str, Any]) -> str:
    lines = ["| model | run of 8 calls | predicted | measured | off |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        off = row["measured"] / row["predicted"] - 1
        lines.append(
            f"| {row['model']} | {row['what']} | {row['predicted']:.3f} | {row['measured']:.3f} | {off:+.1%} |"
        )
    return "\n".join([*lines, "", f"Shares of a plain run's time, one thread, bfloat16. `{result['command']}`"])


def main() -> None:
    args = command_line("action_cost", __doc__, "few rounds and a small U-Net, own file", 1, "of no use here")
    if args.table:
        result = json.loads(args.file.read_text())
    else:
        result = {
            "name": "action_cost", "quick": args.quick,
            "command": "python benchmarks/action_cost.py" + " --quick" * args.quick,
            "rows": [row for name in MODELS for row in rows(name, args.quick)],
            "threads": torch.get_num_threads(), "versions": versions(),
        }  # fmt: skip
    publish(result, markdown(result), args.file, "speed.md")


if __name__ == "__main__":
    main()
