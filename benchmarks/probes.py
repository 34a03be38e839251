"""Every probe against the truth, and its price: rank correlation with exact Shapley values over all 2^S subsets.

`python benchmarks/probes.py [--quick] [--repeats 4]`. Two models: the embedded one, and a second U-Net of another
architecture (three levels, the widest resolution without attention, two transformer blocks in the middle level),
trained here for `--train` steps on the cases' own pictures in the embedded latent space, kept in the run folder. Each
repeat has its own pictures; the oracle has others still, so a probe is judged on what it says of pictures that it has
not seen. The student's variants are judged by a student's oracle (movement of the final latents), the others by
movement of the raw output. `exact` is the oracle on other pictures: how far there is a truth to be found.

Writes `benchmarks/results/probes.json`: rows (probe, model, noise_level, rho, low, high, calls), noise_level null for
the mean over steps; `default`, the probe that wins on the worse of the two models among those that cost at most N (1
+ S) calls. `--model`: another embedded model, whose name is added to the file, the run folder and the marker, which
stands in its own page. Such a model is a second architecture itself: no other is trained, and `ELSEWHERE` is run.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import into, publish
from sharing import ROOT, add_model, flag, page, suffix

from rwopt.cli.screen import quiet
from rwopt.embedded import DEFAULT
from rwopt.models import Model, load_model
from rwopt.objectives import Objectives
from rwopt.objectives.composite import Composite
from rwopt.probes import Importance, make_probe
from rwopt.probes.shapley import every_subset, exact_shapley, skip_loss
from rwopt.probes.teacher import Teacher
from rwopt.sampling.course import Course, course_by_rule
from rwopt.search.evaluation import interval
from rwopt.search.identity import versions
from rwopt.tasks import Dials, Task, make_task
from rwopt.tasks.cases import load_cases
from rwopt.tasks.editing import to_tensor
from rwopt.tasks.reward import task_reward
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites

DIALS = Dials(4.0)
Inputs = tuple[Any, Any, Course, Callable[[torch.Tensor], torch.Tensor]]

REPAIRED = {"energy_guard": "fixed", "reversed": True, "teacher": "cached"}
# name -> (probe, options, which oracle); those of WIDE also with four times the pictures, for the same calls
PROBES: dict[str, tuple[str, dict[str, Any], str]] = {
    "voting (published)": ("voting", {}, "teacher"),
    "voting (repaired)": ("voting", REPAIRED, "teacher"),
    "ablation": ("ablation", {}, "teacher"),
    "ablation .97": ("ablation", {"value": 0.97}, "teacher"),
    "gram": ("gram", {}, "teacher"),
    "gram, row sums": ("gram", {"score": "shapley"}, "teacher"),
    "shapley, 1 order": ("shapley", {}, "teacher"),
    "shapley, 2 orders": ("shapley", {"permutations": 2}, "teacher"),
    "shapley, 4 orders": ("shapley", {"permutations": 4}, "teacher"),
    "gradient norm": ("gradient_norm", {}, "teacher"),
    "reward gradient": ("reward_gradient", {}, "teacher"),
    "reward gradient, teacher": ("reward_gradient", {"trajectory": "teacher"}, "teacher"),
    "snr": ("snr", {"draws": 4}, "teacher"),
    "exact": ("exact", {"trajectory": "teacher"}, "teacher"),
}
STUDENTS = {
    "ablation (for the student)": ("ablation", {}, "student"),
    "shapley, 1 order (for the student)": ("shapley", {}, "student"),
    "ablation, student": ("ablation", {"trajectory": "student"}, "student"),
    "gram, row sums, student": ("gram", {"trajectory": "student", "score": "shapley"}, "student"),
    "shapley, 1 order, student": ("shapley", {"trajectory": "student"}, "student"),
    "reward gradient, student": ("reward_gradient", {}, "student"),
    "voting (repaired), student": ("voting", {**REPAIRED, "trajectory": "student"}, "student"),
    "exact, student": ("exact", {"trajectory": "student"}, "student"),
}
WIDE = (
    "ablation", "gram, row sums", "shapley, 1 order", "reward gradient",
    "shapley, 1 order (for the student)", "shapley, 1 order, student",
)  # fmt: skip
ALL = {**PROBES, **STUDENTS}
ALL |= {f"{name}, more pictures": ALL[name] for name in WIDE}
ELSEWHERE = (*PROBES, *(f"{name}, more pictures" for name in WIDE if name in PROBES))
"""On another model than the default one: what is judged by the raw output."""


def second_model(base: Model, folder: Path, steps: int) -> Model:
    """Another U-Net around the embedded VAE and text encoder; trained once with v-prediction, then kept."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file, save_file

    shape, config = base.latent_shape, base.unet.config
    torch.manual_seed(7)
    unet = UNet2DConditionModel(
        sample_size=shape[1], in_channels=shape[0], out_channels=shape[0], layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 128), transformer_layers_per_block=(1, 2, 1), attention_head_dim=4,
        norm_num_groups=16, cross_attention_dim=config.cross_attention_dim,
    )  # fmt: skip
    model = Model("second", unet, base.vae, base.text_encoder, base.tokenizer, base.scheduler, base.device)
    path = folder / f"second-{steps}.safetensors"
    if path.exists():
        unet.load_state_dict(load_file(path))
    else:
        fit(model, base.name, steps)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(unet.state_dict(), path)
    unet.requires_grad_(False).eval().to(base.device)
    return model


def fit(model: Model, name: str, steps: int, batch: int = 32) -> None:
    """Brief training on the true pictures of an embedded model's train cases: enough that sites differ, not enough for
    good pictures."""
    cases = [c for c in load_cases(name, "train", "editing") if c.truth is not None]
    pictures = to_tensor([c.truth for c in cases])
    assert pictures is not None
    latents, text = model.latents(pictures), model.encode([c.caption for c in cases])
    abar = model.alphas_cumprod
    optimizer = torch.optim.AdamW(model.unet.parameters(), 4e-4)
    generator = torch.Generator().manual_seed(0)
    model.unet.train()
    for _ in range(steps):
        rows = torch.randint(len(cases), (batch,), generator=generator)
        t = torch.randint(len(abar), (batch,), generator=generator)
        noise = torch.randn(batch, *model.latent_shape, generator=generator)
        a, b = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
        out = model.unet(a * latents[rows] + b * noise, t, encoder_hidden_states=text[rows]).sample
        target = a * noise - b * latents[rows] if model.scheduler.config.prediction_type == "v_prediction" else noise
        loss = (out - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"second model: loss {float(loss):.3f} after {steps} steps")


def inputs(task: Task, rows: slice, attachment: Attachment, judged: str) -> Inputs:
    """Start noise, condition and course of some cases, and their reward by the scorer of the model `judged`."""
    x, cond, course = task.inputs(attachment, DIALS, rows)
    reward = Composite({"scorer.alignment": 1.0, "scorer.realism": 1.0}, Objectives(model=judged))
    return x, cond, course, task_reward(task, reward, rows)


@torch.no_grad()
def oracle(model: Model, attachment: Attachment, given: Inputs, trajectory: str) -> np.ndarray:
    """Exact Shapley values [K, S], mean over pictures."""
    x, cond, course, _ = given
    predict, outputs = Teacher(model, attachment, x, cond, course).view(trajectory)
    return np.array([
        exact_shapley(every_subset(skip_loss(predict, i, plain, len(x)), len(attachment.sites))).mean(1)
        for i, plain in enumerate(outputs)
    ])  # fmt: skip


def measure(
    model: Model, ids: list[str], probe: str, options: dict[str, Any], given: Inputs, seed: int
) -> Importance:
    if probe == "exact":
        return exact(model, ids, given, **options)
    x, cond, course, reward = given
    if probe in ("voting", "shapley", "snr"):
        options = {**options, "seed": seed}
    if probe == "reward_gradient":
        options = {**options, "reward": reward}
    made = make_probe(probe, **options)
    with Attachment(model.unet, ids, made.mode) as attachment:
        return made(model, attachment, x, cond, course)


def exact(model: Model, ids: list[str], given: Inputs, trajectory: str) -> Importance:
    """The oracle's values on these pictures, with their price."""
    with Attachment(model.unet, ids) as attachment:
        before = model.calls
        scores = oracle(model, attachment, given, trajectory)
    sigmas = np.array(given[2].sigmas)
    return Importance(tuple(ids), sigmas, scores, calls=model.calls - before, method="exact")


def rows_of(model: Model, args: argparse.Namespace, probes: dict[str, Any]) -> list[dict[str, Any]]:
    """All probes on one model."""
    seen = args.pictures * args.repeats
    cases = load_cases(args.model, "train", "generation", 5 * seen + args.judges)
    task = make_task("generation", model, cases, args.steps, batch=len(cases), plain=DIALS)
    ids = [s.id for s in list_sites(model.unet)][: args.sites]
    with Attachment(model.unet, ids) as attachment:
        first = seen + args.judges
        narrow = [*range(0, seen + 1, args.pictures), first]
        wide = range(first, first + 4 * seen + 1, 4 * args.pictures)
        *few, judged = [inputs(task, slice(*pair), attachment, args.model) for pair in itertools.pairwise(narrow)]
        many = [inputs(task, slice(*pair), attachment, args.model) for pair in itertools.pairwise(wide)]
        truth = {t: oracle(model, attachment, judged, t) for t in {p[2] for p in probes.values()}}
    sigmas = course_by_rule(model, args.steps).sigmas
    out = []
    for name, (probe, options, judge) in probes.items():
        parts = many if name.endswith("more pictures") else many[:2] if probe == "exact" else few
        found = [measure(model, ids, probe, options, given, seed) for seed, given in enumerate(parts)]
        table = np.array([
            [spearman(magnitude(probe, s), t) for s, t in zip(f.scores, truth[judge], strict=True)] for f in found
        ])  # [repeats, K] # fmt: skip
        for level, column in [*zip(sigmas, table.T, strict=True), (None, table.mean(1))]:
            low, high = interval(column) if len(column) > 1 else (None, None)
            out.append({"probe": name, "model": model.name, "noise_level": level, "rho": float(column.mean()),
                        "low": low, "high": high, "calls": found[0].calls, "oracle": judge,
                        "pictures": len(parts[0][0])})  # fmt: skip
        print(f"{model.name:8} {name:28} rho {out[-1]['rho']:+.2f}  calls {out[-1]['calls']}", flush=True)
    return out


def magnitude(probe: str, scores: np.ndarray) -> np.ndarray:
    """A slope says which way to go; how much a site matters to it is its size."""
    return np.abs(scores) if probe in ("reward_gradient", "snr") else scores


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    rho = float(spearmanr(a, b).statistic)
    return rho if np.isfinite(rho) else 0.0  # all equal: says nothing


def markdown(result: dict[str, Any]) -> str:
    """Mean over steps of each probe on both models, then the default's by noise level."""
    models = list(dict.fromkeys(r["model"] for r in result["rows"]))
    names = {"teacher": "the raw output", "student": "the final latents"}
    lines = []
    for judge, what in names.items():
        mine = [r for r in result["rows"] if r["oracle"] == judge]
        if not mine:
            continue
        head = " | ".join(f"rho, {m}" for m in models)
        lines += [f"Importance for {what}:", "", f"| probe | pictures | U-Net calls | {head} |",
                  "|---" * (3 + len(models)) + "|"]  # fmt: skip
        table = {(r["probe"], r["model"]): r for r in mine if r["noise_level"] is None}
        order = sorted(dict.fromkeys(p for p, _ in table), key=lambda p: -min(table[p, m]["rho"] for m in models))
        for probe in order:
            cells = [cell(table[probe, m]) for m in models]
            row = table[probe, models[0]]
            cells = [str(row.get("pictures", result["pictures"])), str(row["calls"]), *cells]
            lines.append(f"| {probe} | {' | '.join(cells)} |")
        lines.append("")
    levels = sorted({r["noise_level"] for r in result["rows"] if r["noise_level"] is not None}, reverse=True)
    lines += [f"By noise level, {models[0]}:", "", "| probe | " + " | ".join(f"sigma {s:.2f}" for s in levels) + " |",
              "|---" * (1 + len(levels)) + "|"]  # fmt: skip
    shown = (result["default"], "voting (published)", "voting (repaired)", "reward gradient", "snr")
    for probe in dict.fromkeys(shown):
        at = {r["noise_level"]: r for r in result["rows"] if (r["probe"], r["model"]) == (probe, models[0])}
        lines.append(f"| {probe} | " + " | ".join(cell(at[s]) for s in levels) + " |")
    below = (
        f"{result['steps']} steps, {result['judges']} pictures of the oracle; mean and 95 % interval over "
        f"{result['repeats']} sets of pictures. `{result['command']}`"
    )
    lines += ["", below]
    return "\n".join(lines)


def cell(row: dict[str, Any]) -> str:
    band = "" if row["low"] is None else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
    return f"{row['rho']:+.2f}{band}"


def choose(rows: list[dict[str, Any]], budget: int) -> str:
    """The probe with the best mean rho on its worse model, at no more than `budget` calls."""
    means: dict[str, list[float]] = {}
    for r in rows:
        if r["noise_level"] is None and r["oracle"] == "teacher" and r["calls"] <= budget:
            means.setdefault(r["probe"], []).append(r["rho"])
    return max(means, key=lambda name: min(means[name]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: 2 steps, 2 pictures, 5 sites")
    parser.add_argument("--repeats", type=int, default=4, help="independent sets of pictures a probe is run on")
    parser.add_argument("--pictures", type=int, default=4, help="pictures of each set")
    parser.add_argument("--judges", type=int, default=16, help="pictures of the oracle")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sites", type=int, default=7, help="the first so many sites; the oracle takes 2^S calls")
    parser.add_argument("--train", type=int, default=1500, help="training steps of the second model")
    parser.add_argument("--only", nargs="+", choices=ALL, help="some; their rows in the result file are replaced")
    parser.add_argument("--table", action="store_true", help="only make the docs' tables from the result file")
    parser.add_argument("--folder", type=Path, help="run folder (default lightning_logs/bench-probes)")
    add_model(parser)
    args = parser.parse_args()
    place = f"probes{suffix(args.model)}"
    folder = args.folder or ROOT.parent / "lightning_logs" / f"bench-{place}"
    if args.table:
        result = json.loads((ROOT / "results" / f"{place}.json").read_text())
        into(page(args.model, "probes.md"), place, markdown(result))
        return
    default = args.model == DEFAULT
    probes = {name: ALL[name] for name in args.only or (ALL if default else ELSEWHERE)}
    if args.quick:
        args.repeats, args.pictures, args.judges, args.steps, args.train, args.sites = 2, 2, 2, 2, 3, 5
        probes = {k: (p, {**o, "rounds": 1, "epochs": 2} if p == "voting" else o, j) for k, (p, o, j) in PROBES.items()}
    quiet()
    base = load_model(args.model, dtype="float32")
    models = [base, second_model(base, folder, args.train)] if default else [base]
    rows = [row for model in models for row in rows_of(model, args, probes)]
    file = ROOT / "results" / f"{place}{'-quick' * args.quick}.json"
    if args.only:
        others = ALL.keys() - set(args.only)
        rows = [row for row in json.loads(file.read_text())["rows"] if row["probe"] in others] + rows
    sites = {m.name: min(args.sites, len(list_sites(m.unet))) for m in models}
    result = {
        "name": place, "command": "python benchmarks/probes.py" + " --quick" * args.quick + flag(args.model),
        "quick": args.quick, "steps": args.steps, "pictures": args.pictures, "repeats": args.repeats,
        "judges": args.judges, "sites": sites,
        "second_model": f"UNet2DConditionModel (64, 96, 128), {args.train} training steps of 32 pictures" * default,
        "versions": versions(), "rows": rows,
        "default": choose(rows, args.steps * (1 + min(sites.values()))),
    }  # fmt: skip
    publish(result, markdown(result), file, page(args.model, "probes.md").name)
    print("default:", result["default"])


if __name__ == "__main__":
    main()
