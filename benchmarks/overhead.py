"""What a schedule costs: U-Net calls with and without it, paired, on this machine.

`python benchmarks/overhead.py [--quick]`. Full size: Stable Diffusion 1.5 at 512 x 512 and XL at 1024 x 1024, random
weights (the cost does not depend on them). Each round times one call of every method in a new random order; a ratio is
that method's call over the plain call of its round. Given are the median ratio and its 95 % interval (bootstrap over
rounds). Also the number of graphs and recompilations under `torch.compile` over 50 steps. The numbers go to
`benchmarks/results/overhead.json`; --quick (small U-Nets, under a minute) writes the same file and says so in it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from rwopt.apply import apply
from rwopt.files import write_text
from rwopt.neighbours import freeu
from rwopt.schedule import Schedule
from rwopt.sites import SITE_KINDS, list_sites

ROOT = Path(__file__).resolve().parent
NOISE = {"beta_schedule": "scaled_linear"}
CONSTANTS = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
XL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}
SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}


class Enabled(AbstractContextManager[None]):
    """FreeU as diffusers has it, without a schedule."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet

    def __enter__(self) -> None:
        self.unet.enable_freeu(**CONSTANTS)

    def __exit__(self, *_: object) -> None:
        self.unet.disable_freeu()


def ramp(unet: Any, kinds: tuple[str, ...]) -> Schedule:
    ids = tuple(site.id for site in list_sites(unet, kinds))
    weights = np.random.default_rng(0).uniform(0.9, 1.1, (4, len(ids)))
    return Schedule(ids, np.array([12.0, 3.0, 0.5, 0.05]), weights, noise=NOISE)


def ratios(unet: Any, size: int, rounds: int) -> list[dict[str, Any]]:
    """Rows (method, ratio, low, high) for one U-Net and latent side."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, size, size, generator=draw)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=draw)
    methods = {
        "plain": lambda: nullcontext(),
        "plain again": lambda: nullcontext(),  # what the clock itself is worth
        "schedule, transformers": lambda: apply(unet, ramp(unet, ("transformer",))),
        "schedule, all kinds": lambda: apply(unet, ramp(unet, SITE_KINDS)),
        "FreeU, diffusers": lambda: Enabled(unet),
        "FreeU, as a schedule": lambda: apply(unet, freeu(unet, **CONSTANTS, noise=NOISE)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    rng = np.random.default_rng(0)
    for round_ in range(rounds + 1):
        for name in rng.permutation(list(methods)):
            with methods[name]():
                start = time.perf_counter()
                unet(x, torch.tensor(500), text)
                if round_:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
    plain = np.array(seconds["plain"])
    rows = []
    for name in methods:
        each = np.array(seconds[name]) / plain
        means = np.median(rng.choice(each, (4000, rounds)), axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        rows.append(
            {
                "method": name,
                "ratio": round(float(np.median(each)), 5),
                "low": round(float(low), 5),
                "high": round(float(high), 5),
                "seconds": round(float(np.median(seconds[name])), 4),
                "rounds": rounds,
            }
        )
    return rows


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


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small U-Nets, under a minute")
    quick = parser.parse_args().quick
    plan = [("SD1.5, 512 x 512", SD15, 64, 20), ("SDXL, 1024 x 1024", XL, 128, 5)]
    rows = []
    for name, config, size, rounds in plan:
        unet = small(config) if quick else UNet2DConditionModel(**config).eval()
        label = f"small {name.split(',')[0]}" if quick else name
        rows += [{"model": label, **row} for row in ratios(unet, 16 if quick else size, 15 if quick else rounds)]
        del unet
    result = {
        "name": "overhead",
        "command": "python benchmarks/overhead.py" + (" --quick" if quick else ""),
        "quick": quick,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "rows": rows,
        "compile": compiled(),
    }
    path = write_text(ROOT / "results" / "overhead.json", json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(f"{row['model']:24} {row['method']:24} {row['ratio']:.4f}  [{row['low']:.4f}, {row['high']:.4f}]")
    print(f"compile: {result['compile']}\n{path}")


if __name__ == "__main__":
    main()
