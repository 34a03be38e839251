"""The typed border: a recipe (YAML) and `key=value` overrides become these dataclasses, or one clear error.

Composition is OmegaConf's: recipe over defaults, overrides over both. Unknown keys are refused with the nearest valid
one, values are converted to the declared types, ranges are checked here. Nothing behind this module sees OmegaConf.
"""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from rwopt.errors import UserError, at_least_one, check, one_of
from rwopt.files import package_folder
from rwopt.probes import PROBES
from rwopt.tuners import SAMPLERS, TUNERS
from rwopt.tuners.options import GradientOptions
from rwopt.tuners.storage import check_url
from rwopt.unet.sites import GROUPINGS, SITE_KINDS


@dataclass
class ModelSettings:
    """name: "avatars" (embedded) or a diffusers folder or hub id; number formats of U-Net and VAE; device.

    checkpointing: on, off, or auto: whether the U-Net keeps no activations while a gradient is made, which takes less
    memory and more time (auto: on a GPU whose free memory is short).
    """

    name: str = "avatars"
    dtype: str = "auto"
    vae_dtype: str = "auto"
    device: str = "auto"
    checkpointing: str = "auto"


@dataclass
class TaskSettings:
    """What is made: `steps` U-Net calls a picture; how many cases of each split; `draws` start noises a case."""

    name: str = "editing"
    method: str = "sdedit"
    cases: str = "avatars"
    steps: int = 6
    draws: int = 1
    batch: int = 64
    train: int = 48
    validation: int = 64
    test: int = 256

    def __post_init__(self) -> None:
        at_least_one(self, "task", "steps", "draws", "batch", "train", "validation", "test")
        one_of(("editing", "generation"), "task.name", self.name)
        one_of(("sdedit", "inversion"), "task.method", self.method)


@dataclass
class DialSettings:
    """Guidance scale and edit strength: the defaults (the `plain` row) and the box in which they are tuned."""

    guidance: float = 4.0
    strength: float = 0.7
    guidance_bounds: list[float] = field(default_factory=lambda: [1.0, 12.0])
    strength_bounds: list[float] = field(default_factory=lambda: [0.3, 1.0])

    def __post_init__(self) -> None:
        for name, least, most in (("guidance", 1.0, math.inf), ("strength", 0.05, 1.0)):
            key, bounds, value = f"dials.{name}_bounds", getattr(self, f"{name}_bounds"), getattr(self, name)
            limits = f"from {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            fits = len(bounds) == 2 and least <= bounds[0] < bounds[1] <= most and math.isfinite(bounds[1])
            check(fits, key, bounds, f"give two ascending numbers {limits}, [low, high]")
            check(least <= value <= most and math.isfinite(value), f"dials.{name}", value, f"give a number {limits}")


@dataclass
class WeightSettings:
    """Where weights act (`kinds` of site), their groups, how many knots on ln sigma, how far a log-gain may go.

    rank: 0 for a number for each knot and group; else the table of log-gains has this rank, with fewer numbers.
    """

    kinds: list[str] = field(default_factory=lambda: ["self", "cross", "ff"])
    group_by: str = "kind"
    knots: int = 3
    mode: str = "residual"
    rank: int = 0
    radius: float = 0.4

    def __post_init__(self) -> None:
        at_least_one(self, "weights", "knots")
        fits = 0 <= self.rank <= self.knots
        check(fits, "weights.rank", self.rank, f"must be 0 (full) to weights.knots={self.knots}")
        check(0 < self.radius < math.inf, "weights.radius", self.radius, "must be above 0 and finite")
        one_of(("residual", "output"), "weights.mode", self.mode)
        check(bool(self.kinds), "weights.kinds", self.kinds, f"name at least one of {', '.join(SITE_KINDS)}")
        for kind in self.kinds:
            one_of(SITE_KINDS, "weights.kinds", kind)
        one_of(GROUPINGS, "weights.group_by", self.group_by)


@dataclass
class ProbeSettings:
    """The probe whose scores are shown and start the search: its name, how many train cases it sees, its own options.

    start: from `scores` by rank, in [low, high]; `gradient`, a step along the slope of the objective, or
    `gauss_newton`, the step of most reward for how much it moves the output (both need an objective with a gradient);
    auto: `gauss_newton` if there is one, else `scores`.
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
        one_of(("auto", "scores", "gradient", "gauss_newton"), "probe.start", self.start)
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
    """`terms`: what is optimised, a weighted geometric mean; `report`: what else is shown, {name: optimised?}."""

    terms: dict[str, float] = field(default_factory=dict)
    report: dict[str, bool] = field(default_factory=dict)


@dataclass
class TunerSettings:
    """`name`: who proposes weights, auto, gradient, optuna or spsa; `sampler`: Optuna's, for weights and for dials.

    trials: candidates of weights; dial_trials: of the dials at which weights are learned, and twice as many for a
    learned schedule's own; control_trials: of a control's dials; the best `top_k` of each see validation cases.

    For Optuna alone: `objectives`: none for the mean of `objective.terms`, else names ("objective" is that mean); of
    the Pareto front of several the first decides among points whose others are no worse than the plain model's minus
    `slack`. limits: {name: worst mean allowed}. prune: p-value below which a losing candidate is given up (0: never),
    looked at after each `part` cases. storage: URL of studies that `rwopt worker` joins (none: study.db in the run
    folder); heartbeat, grace: seconds between a worker's signs of life, and until one counts as gone.

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
    prune: float = 0.0
    part: int = 8
    batched: int = 1
    storage: str = ""
    heartbeat: float = 10.0
    grace: float = 60.0

    def __post_init__(self) -> None:
        one_of(TUNERS, "tuner.name", self.name)
        one_of(SAMPLERS, "tuner.sampler", self.sampler)
        at_least_one(self, "tuner", "trials", "dial_trials", "control_trials", "top_k", "batched")
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
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    analytic: AnalyticSettings = field(default_factory=AnalyticSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    tuner: TunerSettings = field(default_factory=TunerSettings)
    gradient: GradientOptions = field(default_factory=GradientOptions)
    track: TrackSettings = field(default_factory=TrackSettings)
    arms: list[str] = field(default_factory=list)


def recipes() -> dict[str, tuple[Path, str]]:
    """Recipes that ship with the package: name -> (file, first comment line)."""
    out = {}
    for path in sorted(package_folder("recipes").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        out[path.stem] = (path, first.lstrip("# ").strip())
    return out


def find_recipe(name: str) -> Path:
    """A recipe by name, or a path to one's own."""
    known = recipes()
    if name in known:
        return known[name][0]
    path = Path(name)
    if path.is_file():
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(f"recipe={name}: a recipe file's name ends in .yaml")
        return path
    near = difflib.get_close_matches(path.stem, list(known), 1, 0)
    remedy = f"did you mean {near[0]}? (or the path of a .yaml file)" if near else "give the path of a .yaml file"
    raise UserError(f"recipe={name} is neither a file nor one of {', '.join(known)}: {remedy}")


def load(recipe: str, overrides: Sequence[str] = ()) -> Settings:
    """Settings of a recipe with `key=value` overrides. Raises `UserError` for a key, type or range that is wrong."""
    path = find_recipe(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return parse(text, str(path), overrides)


def parse(text: str, where: str, overrides: Sequence[str] = ()) -> Settings:
    """`load` of a recipe's text; errors name it as `where`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    place = where
    try:
        config = OmegaConf.merge(OmegaConf.structured(Settings), _known(OmegaConf.load(io.StringIO(text)), where))
        for place in overrides:
            config = OmegaConf.merge(config, _known(OmegaConf.create(_nested(place)), place))
        place = where
        settings = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{place}: {f'{key}: ' if key else ''}{str(error).splitlines()[0]}") from None
    except UserError:
        raise
    except Exception as error:  # YAML syntax: the parser's own classes
        raise UserError(f"{place} cannot be read: {' '.join(str(error).split())}") from None
    assert isinstance(settings, Settings)
    if not settings.objective.terms:
        raise UserError(f"{where}: objective.terms is empty: name at least one objective")
    return settings


def to_yaml(settings: Settings) -> str:
    """The resolved recipe, which `load` reads again."""
    from omegaconf import OmegaConf

    return str(OmegaConf.to_yaml(OmegaConf.structured(settings)))


def _nested(item: str) -> dict[str, Any]:
    """An override as nested mappings. In a mapping of free names the rest is one name: objective.terms.judge.kept=2."""
    from omegaconf import OmegaConf

    key, sign, text = item.partition("=")
    parts = key.split(".")
    if not sign or not all(parts):
        raise UserError(f"override {item!r} is not key=value, for example tuner.trials=80")
    node: Any = Settings()
    for depth, part in enumerate(parts):
        if isinstance(node, dict):
            parts[depth:] = [".".join(parts[depth:])]
            break
        node = getattr(node, part, None)
    value: Any = text if isinstance(node, str) else OmegaConf.from_dotlist([f"value={text}"])["value"]
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


def _known(config: Any, where: str) -> Any:
    """The same config, after every key was found in the dataclasses."""

    def walk(node: Any, schema: Any, prefix: str) -> None:
        names = [f.name for f in fields(schema)]
        for key in node:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, 1, 0)
                raise UserError(f"{where}: key {prefix}{key} is unknown: did you mean {prefix}{near[0]}?")
            default, child = getattr(schema(), str(key)), node[key]
            if is_dataclass(default):
                if not hasattr(child, "keys"):
                    example = f"{prefix}{key}.{fields(default)[0].name}"
                    raise UserError(f"{where}: {prefix}{key} is a group: set one of its keys, as {example}=...")
                walk(child, type(default), f"{prefix}{key}.")
            elif isinstance(default, str) and isinstance(child, bool):
                node[key] = "on" if child else "off"  # what YAML takes for a boolean was meant as a word

    if config is None or not hasattr(config, "keys"):
        raise UserError(f"{where}: a recipe is a mapping of keys to values")
    walk(config, Settings, "")
    return config
