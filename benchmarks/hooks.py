"""Time inside of a schedule's hooks and tensor operations a site, against an earlier commit, in one run.

`python benchmarks/hooks.py [--quick] [--against REV] [--rounds 5]`. The U-Net of Stable Diffusion XL (true
architecture, constant weights, bfloat16, one thread) with a schedule on its 210 branches; each round runs both
commits, one after the other, in processes of their own. Time is that of the thread inside of all hooks of a call,
less what the clock itself takes; `bare` is one multiplication of the same tensors in the same places and nothing
else, which no hook can do without. Small latents show what Python costs, large ones what the tensors cost. Operations
are counted on the meta device at true size (a dispatch mode). Writes `benchmarks/results/hooks.json` and the table in
`docs/apply.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
KINDS = {
    "transformers": ("transformer",), "branches": ("self", "cross", "ff"), "resnets": ("resnet",), "skips": ("skip",),
}  # fmt: skip
SIZES = (8, 32)  # latents; 32 is 256 x 256 pixels
WARM = 2  # calls of a process that are not counted


def child(tree: str, size: int, calls: int, bare: bool) -> dict[str, Any]:
    """Measure the package in `tree`; runs in a process of its own."""
    sys.path.insert(0, tree)
    import diffusers
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    import rwopt

    assert rwopt.__file__ is not None
    assert Path(rwopt.__file__).is_relative_to(tree), rwopt.__file__
    sys.path.insert(0, str(HERE))
    from architectures import XL

    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.total += 1
            return func(*args, **(kwargs or {}))

    torch.set_num_threads(1)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**XL).eval().requires_grad_(False).to(torch.bfloat16)
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(20)
    pipe = SimpleNamespace(unet=unet, scheduler=scheduler)

    def schedule(kinds: tuple[str, ...]) -> Any:
        ids = tuple(site.id for site in rwopt.list_sites(unet, kinds))
        weights = np.random.default_rng(0).uniform(0.9, 1.1, (4, len(ids)))
        return rwopt.Schedule(ids, np.array([12.0, 3.0, 0.5, 0.05]), weights)

    def inputs(latents: int, device: str) -> tuple[Any, Any]:
        x = torch.zeros(2, 4, latents, latents, device=device, dtype=torch.bfloat16)
        return x + 0.1, torch.full((2, 77, 2048), 0.1, device=device, dtype=torch.bfloat16)

    if not size:  # count operations instead
        x, text = inputs(128, "meta")

        def operations(step: int) -> int:
            with Count() as count, torch.no_grad():
                unet(x, scheduler.timesteps[step], text)
            return count.total

        plain, out = operations(0), {}
        for name, kinds in KINDS.items():
            with rwopt.apply(pipe, schedule(kinds)) as handle:
                operations(0)
                places = len(handle.schedule.sites)
                if name == "branches":
                    places = 3 * sum(len(m.transformer_blocks) for m in unet.modules() if hasattr(m,
                    "transformer_blocks"))
                out[name] = {"sites": places, "operations": operations(1) - plain}
        return out

    unet.to_empty(device="cpu")
    for parameter in unet.parameters():
        parameter.data.fill_(0.003)
    spent, clock = 0.0, 0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent, clock
            clock += 1
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent += time.thread_time() - start

        return wrapped

    if bare:
        blocks = [b for m in unet.modules() for b in getattr(m, "transformer_blocks", ())]
        for part in (part for block in blocks for part in (block.attn1, block.attn2, block.ff)):
            part.register_forward_hook(lambda module, args, output: output * 1.0625)
    else:
        rwopt.apply(pipe, schedule(KINDS["branches"]))
    for module in unet.modules():
        for table in (module._forward_hooks, module._forward_pre_hooks):
            for key in list(table):
                table[key] = timed(table[key])
    x, text = inputs(size, "cpu")
    seconds = []
    for step in range(WARM + calls):
        spent, clock = 0.0, 0
        with torch.no_grad():
            unet(x, scheduler.timesteps[step], text)
        seconds.append((spent, clock))
    nothing = timed(lambda: None)
    spent = 0.0
    for _ in range(20_000):
        nothing()
    tick = spent / 20_000
    return {"seconds": [own - hooks * tick for own, hooks in seconds[WARM:]], "hooks": seconds[-1][1]}


def measure(tree: Path, size: int, calls: int, bare: bool = False) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", str(tree), str(size), str(calls), *(["--bare"] if bare else [])]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd="/")
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(against: str, rounds: int, calls: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Both commits, round by round: the content of the result file."""
    rows, root = [], HERE.parent
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "old"
        subprocess.run(["git", "-C", str(root), "worktree", "add", "-q", "--detach", str(old), against], check=True)
        try:
            counted = {name: measure(tree, 0, 0) for name, tree in (("before", old), ("now", root))}
            for size in sizes:
                times: dict[str, list[float]] = {"before": [], "now": [], "bare": []}
                for _ in range(rounds):
                    for name, tree in (("before", old), ("now", root), ("bare", root)):
                        found = measure(tree, size, calls, name == "bare")
                        times[name].append(float(np.median(found["seconds"])))
                ratios = np.array(times["now"]) / np.array(times["before"])
                draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
                low, high = np.quantile(np.median(draws, 1), [0.025, 0.975])
                rows.append({
                    "latents": size, **{f"{name}_ms": 1e3 * float(np.median(t)) for name, t in times.items()},
                    "ratio": float(np.median(ratios)), "low": float(low), "high": float(high), "rounds": rounds,
                })  # fmt: skip
        finally:
            subprocess.run(["git", "-C", str(root), "worktree", "remove", "--force", str(old)], check=True)
    return {"rows": rows, "operations": counted}


def markdown(result: dict[str, Any]) -> str:
    """As `docs/apply.md` shows it."""
    lines = ["| SDXL, latents | before, ms | now, ms | now / before | one bare multiplication, ms |", "|---" * 5 + "|"]
    for r in result["rows"]:
        ratio = f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
        size, times = f"{r['latents']} x {r['latents']}", f"{r['before_ms']:.1f} | {r['now_ms']:.1f}"
        lines.append(f"| {size} | {times} | {ratio} | {r['bare_ms']:.1f} |")
    lines += ["", "| operations a site, SDXL at 1024 | " + " | ".join(KINDS) + " |", "|---" * (1 + len(KINDS)) + "|"]
    for name in ("before", "now"):
        cells = [result["operations"][name][kind] for kind in KINDS]
        lines.append(f"| {name} | " + " | ".join(f"{c['operations'] / c['sites']:.1f}" for c in cells) + " |")
    below = f"210 branches, {result['rows'][0]['rounds']} rounds; before is commit {result['against']}."
    return "\n".join([*lines, "", f"{below} `{result['command']}`"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of one size: no evidence, and not kept")
    parser.add_argument("--against", default="4b79b96", help="the commit before (4b79b96: hooks of old)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        tree, size, calls = args.child
        print(json.dumps(child(tree, int(size), int(calls), args.bare)))
        return
    from comparison import publish

    from rwopt.search.identity import versions

    rounds, sizes = (1, SIZES[:1]) if args.quick else (args.rounds, SIZES)
    result = {
        "name": "hooks", "quick": args.quick, "against": args.against, "versions": versions(),
        "command": "python benchmarks/hooks.py" + (" --quick" if args.quick else f" --rounds {rounds}"),
        **run(args.against, rounds, 3 if args.quick else 5, sizes),
    }  # fmt: skip
    file = HERE / "results" / ("hooks-quick.json" if args.quick else "hooks.json")
    publish(result, markdown(result), file, "apply.md")


if __name__ == "__main__":
    main()
