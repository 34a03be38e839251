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
no evidence and not kept. One model alone replaces its rows.

Every round is kept in `lightning_logs/bench-overhead/`, by the sources of `rwopt/unet`: a run that was stopped goes
on, and `--rounds 12` after `--rounds 8` makes 4 (quick runs start anew). Full run: one to two hours of one core.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import SD15, XL
from comparison import ROOT, into
from diffusers import UNet2DConditionModel
from diffusers.models.unets import unet_2d_blocks
from numpy.typing import NDArray

from rwopt.files import write_text
from rwopt.schedule import Schedule
from rwopt.unet.apply import apply
from rwopt.unet.neighbours import freeu
from rwopt.unet.sites import SITE_KINDS, list_sites

NOISE = {"beta_schedule": "scaled_linear"}
CONSTANTS = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
PLAN = {"SD1.5": ("SD1.5, 512 x 512", SD15, 64, 24), "SDXL": ("SDXL, 1024 x 1024", XL, 128, 12)}
PLAIN = "plain again"  # what the clock itself is worth
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


METHODS: dict[str, Callable[[Any, Clock], AbstractContextManager[Any]]] = {
    PLAIN: lambda unet, clock: nullcontext(),
    "schedule, transformers": lambda unet, clock: apply(unet, ramp(unet, ("transformer",))),
    "schedule, all kinds": lambda unet, clock: apply(unet, ramp(unet, SITE_KINDS)),
    "FreeU, diffusers": Enabled,
    "FreeU, as a schedule": lambda unet, clock: apply(unet, freeu(unet, **CONSTANTS, noise=NOISE)),
}


def measure(unet: Any, size: int, dtype: torch.dtype, kept: Kept, rounds: int, wanted: Sequence[str] | None) -> None:
    """Add rounds to `kept` until each method has `rounds`; size: latent side; wanted: methods, None for all."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, size, size, generator=draw).to(dtype)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=draw).to(dtype)
    clock, now = Clock(), torch.tensor(500)

    def call(method: str = PLAIN) -> tuple[Floats, float, float]:
        """Seconds of each segment, of the wall clock, and of the method's own code."""
        with METHODS[method](unet, clock), clock.on(unet, own=method != PLAIN):
            wall = time.perf_counter()
            clock.stamps, clock.own = [time.thread_time()], 0.0
            unet(x, now, text)
            clock.stamps.append(time.thread_time())
            return np.diff(clock.stamps), time.perf_counter() - wall, clock.own

    def missing() -> list[str]:
        return [m for m in METHODS if (wanted is None or m in wanted) and kept.count(m) < rounds]

    if not missing():
        return
    for name in missing():  # warm up
        call(name)
    rng = np.random.default_rng(len(kept.rounds))  # another order of the methods when a run goes on
    before = call()
    while names := missing():
        for name in rng.permutation(names).tolist():
            segments, wall, inside = call(name)
            after = call()
            kept.add(
                {
                    "method": name,
                    "ratio": (2 * segments / (before[0] + after[0])).tolist(),
                    "plain": after[0].tolist(),
                    "wall": 2 * wall / (before[1] + after[1]),
                    "own": 1 + inside / (segments.sum() - inside),
                }
            )
            before = after


class Kept:
    """Rounds of one model on disk, a line each; `path` None: in memory only."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        text = path.read_text() if path and path.exists() else ""
        self.rounds: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def count(self, method: str) -> int:
        return sum(one["method"] == method for one in self.rounds)

    def add(self, one: dict[str, Any]) -> None:
        self.rounds.append(one)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.rounds))

    def rows(self) -> list[dict[str, Any]]:
        """One for each method: ratio, low, high, own, own_high, wall, plain_seconds, rounds."""
        share = np.median([one["plain"] for one in self.rounds], axis=0)
        seconds = float(share.sum())
        share /= seconds
        rng = np.random.default_rng(0)
        rows = []
        for name in filter(self.count, METHODS):
            mine = [one for one in self.rounds if one["method"] == name]
            table = np.array([one["ratio"] for one in mine])  # [rounds, segments]
            resampled = rng.integers(len(table), size=(4000, len(table)))
            draws = np.array([np.median(table[picked], axis=0) @ share for picked in resampled])
            rows.append(
                {
                    "method": name,
                    "ratio": _round(np.median(table, axis=0) @ share),
                    "low": _round(np.quantile(draws, 0.025)),
                    "high": _round(np.quantile(draws, 0.975)),
                    "own": _round(np.median([one["own"] for one in mine])),
                    "own_high": _round(max(one["own"] for one in mine)),
                    "wall": _round(np.median([one["wall"] for one in mine])),
                    "plain_seconds": round(seconds, 3),
                    "rounds": len(mine),
                }
            )
        return rows


def sources() -> str:
    """Short hash of what is measured: rounds of other code are not pooled."""
    folder = ROOT.parent / "rwopt" / "unet"
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))) + torch.__version__.encode()
    return hashlib.sha256(text).hexdigest()[:8]


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
    parser.add_argument("--rounds", type=int, help="calls of each method (default: 24 and 12)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="some methods only; their rows are replaced")
    parser.add_argument("--table", action="store_true", help="only make the docs' table from the result file")
    args = parser.parse_args()
    page = ROOT.parent / "docs" / "apply.md"
    if args.table:
        into(page, "overhead", markdown(json.loads((ROOT / "results" / "overhead.json").read_text())))
        return
    torch.set_num_threads(1)  # so that the thread's processor time is all of the call's
    dtype = torch.float32 if args.quick else torch.bfloat16
    rows: list[dict[str, Any]] = []
    for key, (name, config, size, rounds) in PLAN.items():
        if args.model not in (None, key):
            continue
        unet = small(config) if args.quick else full(config, dtype)
        label = f"small {key}" if args.quick else name
        number = args.rounds or (4 if args.quick else rounds)
        logs = ROOT.parent / "lightning_logs" / "bench-overhead"
        kept = Kept(None if args.quick else logs / f"{key}-{sources()}.jsonl")
        measure(unet, 32 if args.quick else size, dtype, kept, number, args.methods)
        for row in kept.rows():
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
        "rows": rows,
        "compile": compiled(),
    }
    write_text(path, json.dumps(result, indent=2) + "\n")
    print(f"compile: {result['compile']}\n{path}")
    if not args.quick:
        into(page, "overhead", markdown(result))


if __name__ == "__main__":
    main()
