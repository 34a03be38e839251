"""What a schedule costs: U-Net calls with and without it, paired, on this machine.

`python benchmarks/overhead.py [--quick] [--model SD1.5] [--rounds N]`. Full size: Stable Diffusion 1.5 at 512 x 512 and
XL at 1024 x 1024, random weights (the cost does not depend on them), bfloat16, one thread.

How a small cost is seen on a shared machine: the clock is the thread's processor time; every call of a method stands
between two plain calls and is compared with their mean; and each call is cut into its layers' segments (about 60), so
that a disturbance spoils one segment of one round, which the median over rounds drops. A ratio is the mean of the
segments' median ratios, weighed by their share of a plain call; its 95 % interval resamples rounds. `own` is a second,
direct measurement: 1 + processor time inside of the method's own code / the rest of the call.

Also the number of graphs and recompilations under `torch.compile` over 50 steps. Numbers go to
`benchmarks/results/overhead.json`; those of --quick (small U-Nets, under a minute) to `overhead-quick.json`, which is
no evidence and not kept. One model alone replaces its rows. Full run: see `minutes` in the file.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from comparison import ROOT, into
from diffusers import UNet2DConditionModel
from diffusers.models.unets import unet_2d_blocks
from numpy.typing import NDArray

from rwopt.apply import apply
from rwopt.files import write_text
from rwopt.neighbours import freeu
from rwopt.schedule import Schedule
from rwopt.sites import SITE_KINDS, list_sites

NOISE = {"beta_schedule": "scaled_linear"}
CONSTANTS = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
XL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}
PLAN = {"SD1.5": ("SD1.5, 512 x 512", SD15, 64, 24), "SDXL": ("SDXL, 1024 x 1024", XL, 128, 6)}
PLAIN = "plain"
Floats = NDArray[np.float64]


class Clock:
    """Processor time of the segments of a call, and what of it is spent in wrapped code."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self.own = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.own += time.thread_time() - start

        return timed

    @contextmanager
    def on(self, unet: Any, own: bool) -> Iterator[None]:
        """Stamp the end of every layer, behind the method's own hooks; `own`: all hooks there are the method's."""
        if own:
            for module in unet.modules():
                for table in (module._forward_hooks, module._forward_pre_hooks):
                    for key in list(table):
                        table[key] = self.wrap(table[key])
        stamp = lambda *_: self.stamps.append(time.thread_time())  # noqa: E731
        blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        families = ("resnets", "attentions", "downsamplers", "upsamplers")
        layers = [layer for block in blocks for name in families for layer in getattr(block, name, None) or ()]
        hooks = [layer.register_forward_hook(stamp) for layer in (unet.conv_in, *layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Enabled(AbstractContextManager[None]):
    """FreeU as diffusers has it, without a schedule."""

    def __init__(self, unet: Any, clock: Clock) -> None:
        self.unet, self.clock, self.original = unet, clock, unet_2d_blocks.apply_freeu

    def __enter__(self) -> None:
        self.unet.enable_freeu(**CONSTANTS)
        unet_2d_blocks.apply_freeu = self.clock.wrap(self.original)

    def __exit__(self, *_: object) -> None:
        self.unet.disable_freeu()
        unet_2d_blocks.apply_freeu = self.original


def ramp(unet: Any, kinds: tuple[str, ...]) -> Schedule:
    ids = tuple(site.id for site in list_sites(unet, kinds))
    weights = np.random.default_rng(0).uniform(0.9, 1.1, (4, len(ids)))
    return Schedule(ids, np.array([12.0, 3.0, 0.5, 0.05]), weights, noise=NOISE)


def measure(
    unet: Any, size: int, rounds: int, dtype: torch.dtype, wanted: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Rows (method, ratio, low, high, own, own_high) for one U-Net and latent side; wanted: methods, None for all."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, size, size, generator=draw).to(dtype)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=draw).to(dtype)
    clock, now = Clock(), torch.tensor(500)
    methods: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "plain again": nullcontext,  # what the clock itself is worth
        "schedule, transformers": lambda: apply(unet, ramp(unet, ("transformer",))),
        "schedule, all kinds": lambda: apply(unet, ramp(unet, SITE_KINDS)),
        "FreeU, diffusers": lambda: Enabled(unet, clock),
        "FreeU, as a schedule": lambda: apply(unet, freeu(unet, **CONSTANTS, noise=NOISE)),
    }

    methods = {name: method for name, method in methods.items() if wanted is None or name in wanted}

    def call(method: Callable[[], AbstractContextManager[Any]]) -> tuple[Floats, float, float]:
        """Seconds of each segment, of the wall clock, and of the method's own code."""
        with method(), clock.on(unet, own=method is not nullcontext):
            wall = time.perf_counter()
            clock.stamps, clock.own = [time.thread_time()], 0.0
            unet(x, now, text)
            clock.stamps.append(time.thread_time())
            return np.diff(clock.stamps), time.perf_counter() - wall, clock.own

    plain: list[Floats] = []
    ratios: dict[str, list[Floats]] = {name: [] for name in methods}
    own: dict[str, list[float]] = {name: [] for name in methods}
    walls: dict[str, list[float]] = {name: [] for name in methods}
    rng = np.random.default_rng(0)
    for method in methods.values():  # warm up
        call(method)
    before, wall_before, _ = call(nullcontext)
    for _ in range(rounds):
        for name in rng.permutation(list(methods)):
            segments, wall, inside = call(methods[name])
            after, wall_after, _ = call(nullcontext)
            ratios[name].append(2 * segments / (before + after))
            walls[name].append(2 * wall / (wall_before + wall_after))
            own[name].append(1 + inside / (segments.sum() - inside))
            plain.append(after)
            before, wall_before = after, wall_after
    share = np.median(plain, axis=0)
    seconds = float(share.sum())
    share /= seconds
    resampled = rng.integers(rounds, size=(4000, rounds))
    rows = []
    for name in methods:
        table = np.array(ratios[name])  # [rounds, segments]
        draws = np.array([np.median(table[picked], axis=0) @ share for picked in resampled])
        mine = np.array(own[name])
        rows.append(
            {
                "method": name,
                "ratio": _round(np.median(table, axis=0) @ share),
                "low": _round(np.quantile(draws, 0.025)),
                "high": _round(np.quantile(draws, 0.975)),
                "own": _round(np.median(mine)),
                "own_high": _round(mine.max()),
                "wall": _round(np.median(walls[name])),
                "plain_seconds": round(seconds, 3),
                "rounds": rounds,
            }
        )
    return rows


def _round(value: Any) -> float:
    return round(float(value), 5)


def compiled(steps: int = 50) -> dict[str, int]:
    """Graphs and recompilations of one compiled U-Net with a schedule over `steps` noise levels."""
    from torch._dynamo.testing import CompileCounter

    unet = small(SD15)
    apply(unet, ramp(unet, SITE_KINDS))
    counter = CompileCounter()
    net = torch.compile(unet, backend=counter, fullgraph=True)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, unet.config.cross_attention_dim)
    times = torch.linspace(999, 1, steps)
    net(x, times[0], text)
    graphs = counter.frame_count
    for t in times[1:]:
        net(x, t, text)
    return {"steps": steps, "graphs": graphs, "recompiles": counter.frame_count - graphs}


def small(config: dict[str, Any]) -> Any:
    channels = (32, 64, 64, 64)[: len(config.get("block_out_channels", (0,) * 4))]
    changes = {"block_out_channels": channels, "cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 8}
    return UNet2DConditionModel(**{**config, **changes}).eval()


def full(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """Made in `dtype` at once: SDXL in single precision would need 10 GB."""
    standard = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return UNet2DConditionModel(**config).eval()
    finally:
        torch.set_default_dtype(standard)


def markdown(result: dict[str, Any]) -> str:
    """A line for each method, a column for each model."""
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    lines = ["| | " + " | ".join(models) + " |", "|---" * (1 + len(models)) + "|"]
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        cells = []
        for model in models:
            row = next(r for r in result["rows"] if (r["model"], r["method"]) == (model, method))
            cells.append("{ratio:.4f} [{low:.4f}, {high:.4f}] ({rounds}); {own:.4f}".format(**row))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    graphs = result["compile"]
    below = (
        f"Processor time of a U-Net call over that of the plain calls around it, with 95 % interval (rounds), one "
        f"thread, {result['dtype']}; behind it the time inside of the method's own code. Under `torch.compile`, "
        f"{graphs['steps']} steps: graphs {graphs['graphs']}, recompilations {graphs['recompiles']}. "
        f"`{result['command']}`"
    )
    return "\n".join([*lines, "", below])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small U-Nets, under a minute, to overhead-quick.json")
    parser.add_argument("--model", choices=PLAN, help="one model only; its rows are replaced")
    parser.add_argument("--rounds", type=int, help="calls of each method (default: 24 and 6)")
    parser.add_argument("--methods", nargs="+", help="some methods only; their rows are replaced")
    parser.add_argument("--table", action="store_true", help="only make the docs' table from the result file")
    args = parser.parse_args()
    page = ROOT.parent / "docs" / "apply.md"
    if args.table:
        into(page, "overhead", markdown(json.loads((ROOT / "results" / "overhead.json").read_text())))
        return
    torch.set_num_threads(1)  # so that the thread's processor time is all of the call's
    dtype = torch.float32 if args.quick else torch.bfloat16
    began, rows, seen = time.monotonic(), [], []
    for key, (name, config, size, rounds) in PLAN.items():
        if args.model not in (None, key):
            continue
        unet = small(config) if args.quick else full(config, dtype)
        label = f"small {key}" if args.quick else name
        seen.append(label)
        number = args.rounds or (4 if args.quick else rounds)
        for row in measure(unet, 32 if args.quick else size, number, dtype, args.methods):
            rows.append({"model": label, **row})
            print("{model:20} {method:24} {ratio:.4f} [{low:.4f}, {high:.4f}]   own {own:.4f}".format(**rows[-1]))
        del unet
    path = ROOT / "results" / ("overhead-quick.json" if args.quick else "overhead.json")
    if path.exists():
        made = {(row["model"], row["method"]) for row in rows}
        rows += [row for row in json.loads(path.read_text())["rows"] if (row["model"], row["method"]) not in made]
        order = [name for name, *_ in PLAN.values()]
        rows.sort(key=lambda row: order.index(row["model"]) if row["model"] in order else 0)
    result = {
        "name": "overhead",
        "command": "python benchmarks/overhead.py" + (" --quick" if args.quick else ""),
        "quick": args.quick,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "dtype": str(dtype).removeprefix("torch."),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "rows": rows,
        "compile": compiled(),
    }
    write_text(path, json.dumps(result, indent=2) + "\n")
    print(f"compile: {result['compile']}\n{path}")
    if not args.quick:
        into(page, "overhead", markdown(result))


if __name__ == "__main__":
    main()
