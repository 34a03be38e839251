"""The main job: probe, analytic baseline and controls, search, validation, one look at test cases, report.

Each stage leaves its result in the run folder and is skipped if it is there, so that a killed run goes on where it was.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rwopt import baselines, starts
from rwopt.apply import Attachment
from rwopt.arms import Arm, Workshop, dial_box
from rwopt.backprop import task_reward
from rwopt.config import Settings, to_yaml
from rwopt.errors import UserError
from rwopt.evaluation import OBJECTIVE, compare
from rwopt.files import locked, sweep, write_text
from rwopt.identity import fingerprint, version, versions
from rwopt.models import load_model
from rwopt.probes import Importance, make_probe
from rwopt.progress import Progress
from rwopt.report import (
    Report,
    image_grid,
    importance_heatmap,
    schedule_heatmap,
    search_history,
    write_html,
)
from rwopt.results import Arm as Row
from rwopt.sampling import timesteps
from rwopt.schedule import Schedule, noise_block
from rwopt.sites import group_sites, list_sites
from rwopt.tasks.cases import SPLITS
from rwopt.tracking import FanOut, open_tracker, wandb_mode
from rwopt.verdict import report_metrics, verdict
from rwopt.weights import WeightFunction

CONTROLS = ("gradient norm", "uniform mean", "reversed", "permuted sites", "permuted steps")
NOTES = {
    "plain": "no schedule, the recipe's own dials",
    "best guidance": "no schedule, tuned dials",
    "analytic": "published voted schedule, tuned dials",
    "gradient norm": "published closed form from gradient norms, tuned dials",
    "uniform mean": "one weight: the analytic schedule's mean",
    "reversed": "the analytic schedule mirrored at each step",
    "permuted sites": "the analytic schedule, blocks exchanged",
    "permuted steps": "the analytic schedule, steps exchanged",
    "constant": "learned weights that do not change with noise",
    "learned": "learned weights over noise and sites",
}


class Search:
    """One run in one folder. `run()` does everything; benchmarks call the stages one by one."""

    def __init__(self, settings: Settings, folder: Path, progress: Progress) -> None:
        self.settings, self.folder = settings, folder
        if settings.track.wandb == "online":
            wandb_mode("online")  # a missing key is told before anything is done
        text = to_yaml(settings)
        stored = folder / "recipe.yaml"
        if stored.exists() and stored.read_text() != text:
            raise UserError(f"{stored} differs from this recipe: resume without overrides, or use a new folder")
        model = load_model(settings.model.name, settings.model.device, settings.model.dtype)
        self.shop = Workshop(settings, folder, model, progress, fingerprint(settings, model))
        self.progress = progress
        self._check()
        if not stored.exists():
            write_text(stored, text)

    def _check(self) -> None:
        """What the typed border cannot know: names and ranges that depend on the model and the cases."""
        settings, unet = self.settings, self.shop.model.unet
        report_metrics(settings)
        make_probe(settings.probe.name, **settings.probe.options)
        list_sites(unet, settings.weights.kinds)
        least = settings.dials.strength_bounds[0] if settings.task.name == "editing" else 1.0
        timesteps(self.shop.model, settings.task.steps, least)
        for split in SPLITS:
            self.shop.cases(split)

    @property
    def evaluations(self) -> int:
        """Candidate evaluations of a whole run, for the progress bar."""
        t = self.settings.tuner
        # best guidance, dials included; analytic, constant and learned; controls
        return 4 * t.trials + 9 * t.dial_trials + len(CONTROLS) * t.control_trials

    # stages

    def probe(self, name: str, file: str, ids: Sequence[str], cases: int, mode: str, **options: object) -> Importance:
        """Run a probe at some sites on the first train cases, with the recipe's dials."""
        path = self.folder / file
        if path.exists():
            return Importance.load(path)
        task = self.shop.task("train")
        cases = min(cases, len(task))
        if name == "reward_gradient":
            options = {"reward": task_reward(task, self.shop.composites[OBJECTIVE], slice(0, cases)), **options}
        probe = make_probe(name, **options)
        with Attachment(self.shop.model.unet, ids, mode) as attachment:
            x, cond, ts = task.inputs(attachment, self.shop.base, slice(0, cases))
            importance = probe(self.shop.model, attachment, x, cond, ts)
        importance.save(path)
        return importance

    def importance(self) -> Importance:
        """The probe that starts the search, at the sites where the weights will act."""
        wanted = self.settings.probe
        ids = [s.id for s in list_sites(self.shop.model.unet, self.settings.weights.kinds)]
        mode = make_probe(wanted.name, **wanted.options).mode
        return self.probe(wanted.name, "importance.json", ids, wanted.cases, mode, **wanted.options)

    def start(self, function: WeightFunction, how: str = "") -> tuple[np.ndarray, int]:
        """Theta [d] where the search for weights begins (how: default `probe.start`), and its probes' U-Net calls."""
        wanted = self.settings.probe
        how = how or wanted.start
        if how == "auto":
            how = "gauss_newton" if self.shop.differentiable else "scores"
        if how == "scores":
            importance = self.importance()
            return starts.analytic(function, importance, wanted.low, wanted.high), importance.calls
        slope = self.probe("reward_gradient", "slope.json", function.sites, wanted.cases, function.mode)
        if how == "gradient":
            return starts.gradient_step(function, slope, wanted.trust), slope.calls
        gram = self.probe("gram", "gram.json", function.sites, wanted.cases, function.mode)
        return starts.gauss_newton(function, slope, gram, wanted.trust), slope.calls + gram.calls

    def guidance(self) -> Arm:
        """Tuned dials without a schedule; every other tuned arm starts from them."""
        dials = self.shop.base.to_dict()
        trials = self.settings.tuner.dial_trials
        return self.shop.tune_dials("dials", None, trials, {"recipe": dials}, study="guidance")

    def best_guidance(self, start: Arm) -> Arm:
        """The same study, gone on with until it has had as many evaluations as a learned arm, its start included."""
        trials = self.settings.tuner.trials + 3 * self.settings.tuner.dial_trials
        return self.shop.tune_dials(
            "best guidance", None, trials, {"recipe": start.dials.to_dict()}, "guidance", NOTES["best guidance"]
        )

    def dial_starts(self, dials: Arm) -> dict[str, dict[str, float]]:
        """Where the dials of a schedule begin: the tuned ones; for an edit also a lower strength, which changes less.

        Weights that make an edit surer can do with less of it, and a short search may not think of that by itself.
        """
        tuned = dials.dials.to_dict()
        if self.settings.task.name != "editing":
            return {"tuned": tuned}
        return {"tuned": tuned, "weaker": {**tuned, "strength": tuned["strength"] - 0.1}}

    def published(self) -> dict[str, Schedule]:
        """The paper's schedules at this task's noise levels, and their controls."""
        wanted, unet = self.settings.analytic, self.shop.model.unet
        sites = list_sites(unet)
        ids = [s.id for s in sites]
        votes = self.probe(
            "voting", "votes.json", ids, wanted.cases, "output",
            rounds=wanted.rounds, epochs=wanted.epochs, teacher="cached",
        )  # fmt: skip
        norms = self.probe("gradient_norm", "gradient_norms.json", ids, min(4, wanted.cases), "output")
        voted = baselines.voted_schedule(votes, wanted.low, wanted.high)
        return {
            "analytic": voted,
            "gradient norm": baselines.gradient_norm_schedule(norms),
            "uniform mean": baselines.uniform_mean(voted),
            "reversed": baselines.reversed_schedule(voted),
            "permuted sites": baselines.permuted_sites(voted, 0, group_sites(sites, "block")),
            "permuted steps": baselines.permuted_steps(voted, 0),
        }

    def compared(self, dials: Arm) -> list[Arm]:
        """Every arm that learns no weights: plain, best guidance, the published schedules and their controls."""
        arms = [self.shop.fixed("plain", note=NOTES["plain"]), self.best_guidance(dials)]
        points = self.dial_starts(dials)
        tuner = self.settings.tuner
        for name, schedule in self.published().items():
            trials = tuner.trials + 2 * tuner.dial_trials if name == "analytic" else tuner.control_trials
            spent = (dials.evaluations, dials.calls + self.price(name))
            arms.append(self.shop.tune_dials(
                name, schedule, trials, points, note=NOTES[name], spent=spent, around=dials.dials
            ))  # fmt: skip
        return arms

    def price(self, name: str) -> int:
        """U-Net calls of the probe behind a published schedule or control."""
        return Importance.load(self.folder / ("gradient_norms.json" if name == "gradient norm" else "votes.json")).calls

    def functions(self) -> tuple[WeightFunction, WeightFunction]:
        """The weight function of the recipe, and the same with one knot (constant over noise)."""
        wanted = self.settings.weights
        sites = list_sites(self.shop.model.unet, wanted.kinds)
        strength = self.shop.base.strength if self.settings.task.name == "editing" else 1.0
        ts = timesteps(self.shop.model, self.settings.task.steps, strength)
        first, last = np.log(self.shop.model.sigma(ts[0])), np.log(self.shop.model.sigma(ts[-1]))
        middle = float(np.exp((first + last) / 2))
        knots = [middle] if wanted.knots == 1 else np.exp(np.linspace(first, last, wanted.knots)).tolist()
        return (
            WeightFunction.build(sites, knots, wanted.group_by, wanted.mode, wanted.rank),
            WeightFunction.build(sites, [middle], wanted.group_by, wanted.mode),
        )

    def learn(self, dials: Arm, seed: int, name: str = "learned", constant: bool = False) -> Arm:
        """The learned arm, or its constant control: weights at the tuned dials, then dials for these weights."""
        function = self.functions()[1 if constant else 0]
        start, price = self.start(function)
        weights = self.shop.tune_weights(
            f"{name} weights", function, dials.dials, {"plain": np.zeros(function.dimension), "probe": start}, seed,
            spent=(dials.evaluations, dials.calls + price),
        )  # fmt: skip
        return self.shop.tune_dials(
            name, weights.schedule, 2 * self.settings.tuner.dial_trials, self.dial_starts(dials),
            note=NOTES["constant" if constant else "learned"], spent=(weights.evaluations, weights.calls),
            around=dials.dials,
        )  # fmt: skip

    def describe(self, arm: Arm, command: str) -> Schedule:
        """The arm's schedule with everything that another machine must know."""
        assert arm.schedule is not None
        shop, task = self.shop, self.settings.task
        return replace(
            arm.schedule,
            model=shop.model.card(),
            noise=noise_block(shop.model.scheduler),
            calibrated={
                "task": task.name,
                **({"method": task.method} if task.name == "editing" else {}),
                "num_inference_steps": task.steps,
                "scheduler": {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "eta": 0.0},
                "guidance_scale": arm.dials.guidance,
                **({"strength": arm.dials.strength} if task.name == "editing" else {}),
                "resolution": [int(n) for n in shop.task("train").references.shape[-2:]],  # type: ignore[union-attr]
            },
            provenance={
                "rwopt": version("rwopt"),
                "command": command,
                "objective": dict(self.settings.objective.terms),
                "seed": self.settings.tuner.seed,
                "evaluations": arm.evaluations,
                "calls": arm.calls,
                "validation": arm.validation,
                **({"choice": arm.choice} if arm.choice else {}),
            },
        )

    # the whole way

    def run(self, command: str) -> Report:
        """All stages. Leaves the report, pictures, schedule and records in the folder, which it keeps to itself."""
        with locked(self.folder):
            sweep(self.folder)
            return self._run(command)

    def _run(self, command: str) -> Report:
        words = [word.removeprefix("recipe=") for word in shlex.split(command) if word.startswith("recipe=")]
        recipe = Path(words[-1]).stem if words else "own"
        tracker = open_tracker(
            self.folder, self.settings.track.wandb, self.settings.track.project, config=asdict(self.settings)
        )
        with tracker:
            self._log_once(tracker)
            self.progress.start(self.evaluations)
            dials = self.guidance()
            importance = self.importance()
            arms = self.compared(dials)
            arms.append(self.learn(dials, self.settings.tuner.seed, "constant", constant=True))
            arms.append(self.learn(dials, self.settings.tuner.seed))
            path = self.folder / "schedule.json"
            if not path.exists():
                self.describe(arms[-1], command).save(path)
            report = self.report(arms, recipe, command)
            self._publish(report, arms, Schedule.load(path), importance, tracker)
        return report

    def _log_once(self, tracker: FanOut) -> None:
        """Send each trial, and each update of a gradient, once, also when a resumed run tells it again."""
        names = ("study", "trial", "update")
        seen = {tuple(map(r.get, names)) for r in tracker.read("log")}

        def log(record: dict[str, Any]) -> None:
            key = tuple(map(record.get, names))
            if key not in seen:
                seen.add(key)
                tracker.log(record)

        self.shop.log = log

    def report(self, arms: Sequence[Arm], recipe: str, command: str) -> Report:
        """The one look at the test cases."""
        columns = report_metrics(self.settings)
        names = list(self.settings.objective.report)
        self.progress.advance("test", None, 0)
        scores = {arm.name: self.shop.test(arm, names) for arm in arms}
        pairs = [("learned", other) for other in scores if other != "learned"]
        pairs += [("learned", "analytic"), ("constant", "best guidance")]
        paired = [
            compare([scores[a]], [scores[b]], m.name, (a, b), m.optimised, "test", m.higher_is_better)
            for a, b in dict.fromkeys(pairs)
            for m in columns
        ]
        rows = [Row(a.name, scores[a.name].means(), a.calls, f"{a.note}; {dial_text(a, self.settings)}") for a in arms]
        return Report(
            title=f"rwopt search: {recipe}",
            recipe=recipe,
            task=self.settings.task.name,
            metrics=columns,
            arms=rows,
            paired=paired,
            split="test",
            cases=self.settings.task.test,
            settings=asdict(self.settings),
            versions=versions(),
            command=command,
            verdict=verdict(paired),
        )

    def _publish(
        self, report: Report, arms: Sequence[Arm], schedule: Schedule, importance: Importance, tracker: FanOut
    ) -> None:
        folder, by_name = self.folder, {a.name: a for a in arms}
        schedule_heatmap(schedule, folder / "schedule.png")
        importance_heatmap(importance, folder / "probe.png")
        weights = self.shop.kept("learned weights")
        assert weights is not None  # the learned arm was made of it
        history = weights.history
        marks = {origin: i for i, (origin, _) in enumerate(history) if origin in ("plain", "probe")}
        search_history([value for _, value in history], folder / "history.png", starts=marks)
        if not (folder / "grid.png").exists():
            self.grid(by_name, folder / "grid.png")
        write_html(report, folder)
        for name in ("schedule", "probe", "history", "grid"):
            tracker.image(name, folder / f"{name}.png")
        tracker.artifact(folder / "schedule.json", "schedule", "schedule", dict(schedule.calibrated))
        tracker.summary({f"{row.name}/{k}": v for row in report.arms for k, v in row.means.items()})

    def grid(self, arms: dict[str, Arm], path: Path, rows: int = 8) -> None:
        """Cases of the test split: source, plain, best guidance, analytic, learned, truth."""
        cases = self.shop.cases("test")
        chosen = cases[:: max(1, len(cases) // rows)]
        if self.settings.task.name == "editing":  # one of each kind of edit first
            first = {c.kind: c for c in reversed(cases)}
            chosen = [*first.values(), *(c for c in chosen if c not in first.values())]
        task = self.shop.prepare(chosen[:rows])

        def pictures(images: torch.Tensor) -> list[np.ndarray]:
            rows = images[:: self.settings.task.draws]
            return list((rows * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())

        columns: dict[str, list[np.ndarray]] = {}
        if self.settings.task.name == "editing" and task.references is not None:
            columns["source"] = pictures(task.references)
        for name in ("plain", "best guidance", "analytic", "learned"):
            columns[name] = pictures(task.images(arms[name].dials, arms[name].schedule))
        truth = task.describe(torch.zeros(len(task), 3, 1, 1)).truth
        if truth is not None:
            columns["truth"] = pictures(truth)
        captions = [
            ", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in c.change.items()) or c.caption for c in chosen[:rows]
        ]
        image_grid(columns, path, captions)


def dial_text(arm: Arm, settings: Settings) -> str:
    names = [p.name for p in dial_box(settings.task.name, settings.dials)]
    return ", ".join(f"{n} {arm.dials.to_dict()[n]:g}" for n in names)
