"""What a recipe may say: one dataclass a group, each field typed, with its default and its range."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from rwopt.embedded import DEFAULT
from rwopt.errors import at_least_one, check, one_of
from rwopt.probes import PROBES
from rwopt.sampling.grids import GRIDS, levels_of_text
from rwopt.schedule.actions import by_letters
from rwopt.schedule.samplers import SAMPLERS
from rwopt.schedule.steps import DIALS
from rwopt.tuners import SAMPLERS as SEARCHERS
from rwopt.tuners import TUNERS
from rwopt.tuners.options import GradientOptions
from rwopt.tuners.storage import check_url
from rwopt.unet.sites import GROUPINGS, SITE_KINDS


def check_grid(key: str, grid: str) -> None:
    """Raise `UserError` unless `grid` is one of `rwopt.sampling.grids.GRIDS` or a list of noise levels."""
    if "," in grid or grid[:1].isdigit():
        levels_of_text(grid)
    else:
        one_of(GRIDS, key, grid)


@dataclass
class ModelSettings:
    """name: an embedded model ("avatars"), a diffusers folder, a hub id, or a single .safetensors file; number formats
    of U-Net and VAE; device.

    revision, variant: of the hub; config: folder or hub id that says what a single file is, where there is no hub; vae:
    another one; loras: {folder, file or id: scale}; embeddings: textual inversions; negative: the negative prompt.
    checkpointing: on, off, or auto: whether the U-Net keeps no activations while a gradient is made, which takes less
    memory and more time (auto: on a GPU whose free memory is short).
    """

    name: str = DEFAULT
    dtype: str = "auto"
    vae_dtype: str = "auto"
    device: str = "auto"
    checkpointing: str = "auto"
    revision: str = ""
    variant: str = ""
    config: str = ""
    vae: str = ""
    loras: dict[str, float] = field(default_factory=dict)
    embeddings: list[str] = field(default_factory=list)
    clip_skip: int = 0
    negative: str = ""


@dataclass
class TeacherSettings:
    """The truth for `teacher.*` objectives: the plain model's picture from the same start in `steps` calls."""

    steps: int = 50
    sampler: str = "dpmpp_2m"
    grid: str = "trailing"

    def __post_init__(self) -> None:
        at_least_one(self, "task.teacher", "steps")
        one_of(tuple(SAMPLERS), "task.teacher.sampler", self.sampler)
        check_grid("task.teacher.grid", self.grid)


@dataclass
class TaskSettings:
    """What is made: `steps` U-Net calls a picture; how many cases of each split; `draws` start noises a case.

    cases: "avatars", "prompts", a file or a folder (`data/README.md`); instruction: what an edit wants of pictures
    whose cases do not say; fit: how pictures of other sizes are fitted, crop or pad; size: [height, width] in pixels,
    none for the model's own. method: of an edit: sdedit and inversion with any text-to-picture model, instruct with an
    InstructPix2Pix, inpaint where cases have masks.
    sampler, grid: a solver, and the rule by which its noise levels lie (`rwopt.sampling.grids`), or a list of VE noise
    levels as text, "14.6,2.9,0.3".
    budget: the share of the time of `steps` full calls that a learned arm may take; below 1 a plan of actions is
    searched for (`speed`), and plain solvers have as many calls as the budget pays.
    """

    name: str = "editing"
    method: str = "sdedit"
    cases: str = DEFAULT
    instruction: str = ""
    fit: str = "crop"
    size: list[int] | None = None
    steps: int = 6
    sampler: str = "ddim"
    grid: str = "trailing"
    budget: float = 1.0
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    draws: int = 1
    batch: int = 64
    train: int = 48
    validation: int = 64
    test: int = 256

    def __post_init__(self) -> None:
        at_least_one(self, "task", "steps", "draws", "batch", "train", "validation", "test")
        check(0 < self.budget <= 1, "task.budget", self.budget, "must be above 0 and at most 1 (the plain run's time)")
        one_of(("editing", "generation"), "task.name", self.name)
        one_of(("sdedit", "inversion", "instruct", "inpaint"), "task.method", self.method)
        one_of(("crop", "pad"), "task.fit", self.fit)
        one_of(tuple(SAMPLERS), "task.sampler", self.sampler)
        check_grid("task.grid", self.grid)

    @property
    def affordable(self) -> int:
        """Full calls that the budget pays, 1 at least."""
        return max(1, int(self.budget * self.steps + 1e-9))

    @property
    def kind(self) -> str:
        """What is done: generation, or the method of editing."""
        return self.method if self.name == "editing" else self.name

    @property
    def has_strength(self) -> bool:
        """Whether a picture starts at the level of `dials.strength`; others start from noise."""
        return self.kind not in ("generation", "instruct")


@dataclass
class DialSettings:
    """Guidance scale, edit strength, and for instructions the scale of guidance towards the source: the defaults (the
    `plain` row) and the box in which they are tuned."""

    guidance: float = 4.0
    strength: float = 0.7
    image_guidance: float = 1.5
    guidance_bounds: list[float] = field(default_factory=lambda: [1.0, 12.0])
    strength_bounds: list[float] = field(default_factory=lambda: [0.3, 1.0])
    image_guidance_bounds: list[float] = field(default_factory=lambda: [1.0, 3.0])

    def __post_init__(self) -> None:
        limits_of = (("guidance", 1.0, math.inf), ("strength", 0.05, 1.0), ("image_guidance", 1.0, math.inf))
        for name, least, most in limits_of:
            key, bounds, value = f"dials.{name}_bounds", getattr(self, f"{name}_bounds"), getattr(self, name)
            limits = f"from {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            fits = len(bounds) == 2 and least <= bounds[0] < bounds[1] <= most and math.isfinite(bounds[1])
            check(fits, key, bounds, f"give two ascending numbers {limits}, [low, high]")
            check(least <= value <= most and math.isfinite(value), f"dials.{name}", value, f"give a number {limits}")


@dataclass
class WeightSettings:
    """Where weights act (`kinds` of site), their groups, how many knots on ln sigma, how far a log-gain may go.

    knots: spread evenly over the noise levels of the calls; 0: one at each call.
    rank: 0 for a number for each knot and group; else the table of log-gains has this rank, with fewer numbers.
    """

    kinds: list[str] = field(default_factory=lambda: ["self", "cross", "ff"])
    group_by: str = "kind"
    knots: int = 3
    mode: str = "residual"
    rank: int = 0
    radius: float = 0.4

    def __post_init__(self) -> None:
        check(self.knots >= 0, "weights.knots", self.knots, "must be 0 (one at each call) or more")
        fits = 0 <= self.rank <= (self.knots or math.inf)
        check(fits, "weights.rank", self.rank, f"must be 0 (full) to weights.knots={self.knots}")
        check(0 < self.radius < math.inf, "weights.radius", self.radius, "must be above 0 and finite")
        one_of(("residual", "output"), "weights.mode", self.mode)
        check(bool(self.kinds), "weights.kinds", self.kinds, f"name at least one of {', '.join(SITE_KINDS)}")
        for kind in self.kinds:
            one_of(SITE_KINDS, "weights.kinds", kind)
        one_of(GROUPINGS, "weights.group_by", self.group_by)


@dataclass
class StepSettings:
    """`learn`: the sampler's dials that are learned beside weights, of clock, told, guidance (`rwopt.schedule.steps`).

    samplers, grids: among which a comparison looks for the best plain solver.
    """

    learn: list[str] = field(default_factory=list)
    samplers: list[str] = field(default_factory=lambda: ["ddim", "dpmpp_2m", "uni_pc"])
    grids: list[str] = field(default_factory=lambda: list(GRIDS))

    def __post_init__(self) -> None:
        for name in self.learn:
            one_of(DIALS, "steps.learn", name)
        for name in self.samplers:
            one_of(tuple(SAMPLERS), "steps.samplers", name)
        for name in self.grids:
            check_grid("steps.grids", name)


@dataclass
class SpeedSettings:
    """The search for a plan, where `task.budget` is below 1 (`rwopt.search.speed`): letters of the actions that it may
    take (`rwopt.schedule.actions`), calls in a row that one stored value may serve, train cases on which errors are
    measured, and how many plans of each grid are tried on validation cases.

    cost: a file of `rwopt cost --out`, by which actions are priced in place of measuring them here: of the machine that
    will use the plan.
    """

    actions: str = "ho1ag"
    max_gap: int = 2
    cases: int = 16
    proposals: int = 12
    cost: str = ""

    def __post_init__(self) -> None:
        at_least_one(self, "speed", "max_gap", "cases", "proposals")
        by_letters(self.actions)


@dataclass
class ProbeSettings:
    """The probe whose scores are shown and start the search: its name, how many train cases it sees, its own options.

    start: from `scores` by rank, in [low, high]; `gradient`, a step along the slope of the objective, or
    `gauss_newton`, the step of most reward for how much it moves the output (both need an objective with a gradient);
    auto: `gauss_newton` if there is one, else `scores`; dials: no probe, but what the arm of the same sampler's dials
    without weights has learned, from where a gradient goes at a third of its rate; none: from the plain model alone.
    trust: how far these two go (largest log-gain; relative movement of the output).
    """

    name: str = "shapley"
    cases: int = 16
    options: dict[str, Any] = field(default_factory=dict)
    low: float = 0.95
    high: float = 1.1
    start: str = "auto"
    trust: float = 0.1

    def __post_init__(self) -> None:
        one_of(tuple(PROBES), "probe.name", self.name)
        one_of(("auto", "scores", "gradient", "gauss_newton", "dials", "none"), "probe.start", self.start)
        check(0 < self.trust < math.inf, "probe.trust", self.trust, "must be above 0 and finite")
        at_least_one(self, "probe", "cases")
        fits = 0 < self.low < self.high < math.inf
        check(fits, "probe.low", self.low, f"must lie between 0 and probe.high={self.high}")


@dataclass
class AnalyticSettings:
    """The published baseline: voting probe (rounds x epochs) at transformer blocks, output mode, in [low, high]."""

    cases: int = 8
    rounds: int = 5
    epochs: int = 12
    low: float = 0.95
    high: float = 1.1

    def __post_init__(self) -> None:
        at_least_one(self, "analytic", "cases", "rounds", "epochs")
        fits = 0 < self.low < self.high < math.inf
        check(fits, "analytic.low", self.low, f"must lie between 0 and analytic.high={self.high}")


@dataclass
class ObjectiveSettings:
    """`terms`: what is optimised, {name: weight}, combined as `combine` says (`rwopt.objectives.composite`); a name may
    be a function of one's own, path/to/file.py:function. report: what else is shown, {name: optimised?}; sets: numbers
    of whole sets (kid), shown for the test cases.

    options: {name: {key: value}}, such as where weights are. invalid: what a picture without a score does (no face, an
    empty mask): drop, it leaves the mean, or fail, it counts as the worst of the range.
    """

    terms: dict[str, float] = field(default_factory=dict)
    report: dict[str, bool] = field(default_factory=dict)
    sets: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    combine: str = "auto"
    invalid: str = "drop"

    def __post_init__(self) -> None:
        one_of(("auto", "geometric", "calibrated"), "objective.combine", self.combine)
        one_of(("drop", "fail"), "objective.invalid", self.invalid)
        options: dict[str, Any] = {}
        for name, value in self.options.items():
            if not isinstance(value, dict):  # objective.options.clip.t.checkpoint=place, as an override says it
                name, _, key = name.rpartition(".")
                value = {key: value}
            check(bool(name), "objective.options", self.options, "give {name: {key: value}}")
            options.setdefault(name, {}).update(value)
        self.options = options


@dataclass
class TunerSettings:
    """`name`: who proposes weights, auto, gradient, optuna or spsa; `sampler`: Optuna's, for weights and for dials.

    trials: candidates of weights; dial_trials: of the dials at which weights are learned, and twice as many for a
    learned schedule's own (0: all are at the recipe's dials); control_trials: of a control's dials; the best `top_k` of
    each see validation cases.

    For Optuna alone: `objectives`: none for the mean of `objective.terms`, else names ("objective" is that mean); of
    the Pareto front of several the first decides among points whose others are no worse than the plain model's minus
    `slack`. limits: {name: worst mean allowed}. prune: p-value below which a losing candidate is given up (0: never),
    looked at after each `part` cases. storage: URL of studies that `rwopt worker` joins (none: study.db in the run
    folder); heartbeat, grace: seconds between a worker's signs of life, and until one counts as gone.

    guard: {name: slack}: measured on validation cases while an arm is tuned; a candidate whose mean is worse than the
    plain model's by more than slack cannot be chosen, and after `guard_patience` such candidates in a row, each better
    on the objective than all that keep the guard, tuning stops.

    batched: candidates proposed and scored at once, knowing nothing of each other's scores: what their trajectories
    share is computed once, and they share U-Net calls if `task.batch` holds more pictures than a candidate has.
    """

    name: str = "auto"
    sampler: str = "auto"
    trials: int = 40
    dial_trials: int = 16
    control_trials: int = 8
    top_k: int = 4
    seed: int = 0
    objectives: list[str] = field(default_factory=list)
    slack: float = 0.0
    limits: dict[str, float] = field(default_factory=dict)
    guard: dict[str, float] = field(default_factory=dict)
    guard_patience: int = 3
    prune: float = 0.0
    part: int = 8
    batched: int = 1
    storage: str = ""
    heartbeat: float = 10.0
    grace: float = 60.0

    def __post_init__(self) -> None:
        one_of(TUNERS, "tuner.name", self.name)
        one_of(SEARCHERS, "tuner.sampler", self.sampler)
        at_least_one(self, "tuner", "trials", "control_trials", "top_k", "batched", "guard_patience")
        check(self.dial_trials >= 0, "tuner.dial_trials", self.dial_trials, "must be 0 or more")
        for name, slack in self.guard.items():
            check(0 <= slack < math.inf, f"tuner.guard.{name}", slack, "must be 0 or more, and finite")
        self._check_optuna()

    @property
    def only_optuna(self) -> bool:
        """Whether something is asked for that only Optuna's tuner can do."""
        return bool(self.objectives or self.limits or self.prune)

    def _check_optuna(self) -> None:
        fits = self.name in ("auto", "optuna") or not self.only_optuna
        check(fits, "tuner.name", self.name, "takes no tuner.objectives, .limits and .prune: use tuner.name=optuna")
        if self.storage:
            check_url(self.storage)
        names = self.objectives
        check(len(set(names)) == len(names), "tuner.objectives", names, "names one twice: give each once")
        several = len(names) > 1
        check(not (several and self.sampler == "cmaes"), "tuner.sampler", "cmaes", "takes one objective: use nsga2")
        check(not (several and self.prune), "tuner.prune", self.prune, "compares by one objective: set it to 0")
        check(0 <= self.prune < 0.5, "tuner.prune", self.prune, "must be a p-value from 0 (off) to below 0.5")
        check(0 <= self.slack < math.inf, "tuner.slack", self.slack, "must be 0 or more, and finite")
        for name, bound in self.limits.items():
            check(math.isfinite(bound), f"tuner.limits.{name}", bound, "must be finite")
        fits = self.batched == 1 or not self.prune
        check(fits, "tuner.batched", self.batched, "gives nothing up early: set it to 1, or tuner.prune to 0")
        at_least_one(self, "tuner", "part")
        check(1 <= self.heartbeat < math.inf, "tuner.heartbeat", self.heartbeat, "must be at least 1 (seconds)")
        fits = 2 * self.heartbeat <= self.grace < math.inf
        check(fits, "tuner.grace", self.grace, f"must be at least twice tuner.heartbeat={self.heartbeat:g}")


@dataclass
class TrackSettings:
    """W&B: auto (online if a key is there, else offline), online, offline or off."""

    wandb: str = "auto"
    project: str = "rwopt"

    def __post_init__(self) -> None:
        one_of(("auto", "online", "offline", "off"), "track.wandb", self.wandb)


@dataclass
class Settings:
    """Everything a search depends on, but for where it runs. `arms`: what it compares (`rwopt.search.arms`), or all."""

    model: ModelSettings = field(default_factory=ModelSettings)
    task: TaskSettings = field(default_factory=TaskSettings)
    dials: DialSettings = field(default_factory=DialSettings)
    weights: WeightSettings = field(default_factory=WeightSettings)
    steps: StepSettings = field(default_factory=StepSettings)
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    analytic: AnalyticSettings = field(default_factory=AnalyticSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    tuner: TunerSettings = field(default_factory=TunerSettings)
    gradient: GradientOptions = field(default_factory=GradientOptions)
    track: TrackSettings = field(default_factory=TrackSettings)
    arms: list[str] = field(default_factory=list)
