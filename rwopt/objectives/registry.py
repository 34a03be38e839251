"""Every objective by name: the families of this room, those of other packages, and functions in a file of one's own.

A family is a module as `rwopt.objectives.objective` describes it. Other packages give theirs by an entry point of the
group `rwopt.objectives`. What a family imports at its top must be there in every installation.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from importlib.util import find_spec
from typing import Any

from packaging.requirements import Requirement

from rwopt.embedded import DEFAULT
from rwopt.errors import UserError
from rwopt.objectives import own
from rwopt.objectives.judges import judges_of
from rwopt.objectives.objective import INVALID, AnyObjective, Objective, ObjectiveSpec, SetObjective, check_options

FAMILIES = ("judges", "pixel", "teacher", "image_reward", "clip", "hps", "dino", "lpips", "vlm", "quality", "structure",
            "masked", "effnet", "faces", "sets")  # fmt: skip
"""Modules of this room."""

ENTRY_POINTS = "rwopt.objectives"


@cache
def families() -> Mapping[str, Any]:
    """Family -> module, of this room."""
    names = {family: f"rwopt.objectives.{family}" for family in FAMILIES}
    return {family: import_module(path) for family, path in names.items() if find_spec(path) is not None}


@cache
def plugins() -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """Families of other packages: those that load, and why the others do not, in one line each."""
    good, bad = dict[str, Any](), dict[str, str]()
    for point in entry_points(group=ENTRY_POINTS):
        try:
            family = point.load()
            family.specs()
            good[point.name] = family
        except Exception as error:  # whatever another's code does
            bad[point.name] = f"{point.value}: {type(error).__name__}: {' '.join(str(error).split())}"
    return good, bad


def every_spec() -> dict[str, ObjectiveSpec]:
    """Name -> what it declares, of all objectives but functions in files of one's own. Loads no network."""
    return {name: spec for family in _all() for name, spec in family.specs().items()}


def objective_names() -> list[str]:
    """Every name that `make_objective` takes, but for functions of one's own, which are "path/to/file.py:function"."""
    return [name for name, spec in every_spec().items() if spec.level == "image"]


def objective_spec(name: str) -> ObjectiveSpec:
    """What an objective declares. Loads no network. Raises `UserError` with the nearest name for an unknown one."""
    spec: ObjectiveSpec = own.spec_of(name) if own.is_own(name) else family_of(name).specs()[name]
    return spec


def family_of(name: str) -> Any:
    """The module that has the objective `name`, which is none of one's own."""
    for family in _all():
        if name in family.specs():
            return family
    known = list(every_spec())
    near = difflib.get_close_matches(name, known, 1, 0)
    broken = "".join(f"; entry point {point} does not load: {why}" for point, why in plugins()[1].items())
    raise UserError(f"objective {name} is unknown: did you mean {near[0]}? (rwopt objectives lists all{broken})")


def make_objective(name: str, **options: Any) -> Objective:
    """The objective of that name, with its networks if it has some.

    Raises `UserError` for an unknown name or option, for one that is made for sets, and where a package or weights are
    missing.
    """
    if objective_spec(name).level != "image":
        raise UserError(f"objective {name} is one number for a whole set, not for a picture: use it in objective.sets")
    made = _make(name, options)
    assert isinstance(made, Objective), name
    return made


def make_set(name: str, **options: Any) -> SetObjective:
    """`make_objective` for objectives of sets."""
    if objective_spec(name).level != "set":
        raise UserError(f"objective.sets: {name} scores single pictures: use it in objective.report")
    made = _make(name, options)
    assert isinstance(made, SetObjective), name
    return made


def missing(name: str, **options: Any) -> str:
    """What an objective lacks here, in one line that says how to get it; "" if nothing. Loads no network."""
    spec = objective_spec(name)
    if spec.extra and lacking(spec.extra):
        return f"pip install rwopt[{spec.extra}] ({', '.join(lacking(spec.extra))} not installed)"
    told = None if own.is_own(name) else getattr(family_of(name), "missing", None)
    return "" if told is None else str(told(name, **options))


class Objectives:
    """Objectives with a recipe's options, each made at its first use and kept.

    invalid: of `settle`; model: what draws the pictures, whose judges are asked (`rwopt.objectives.judges.judges_of`).
    """

    def __init__(
        self, options: Mapping[str, Mapping[str, Any]] | None = None, invalid: str = INVALID[0], model: str = DEFAULT
    ) -> None:
        self.options, self.invalid, self.judges = dict(options or {}), invalid, judges_of(model)
        self._made: dict[str, Objective] = {}

    def __getitem__(self, name: str) -> Objective:
        """As `make_objective`."""
        if name not in self._made:
            self._made[name] = make_objective(name, **self.given(name))
        return self._made[name]

    def given(self, name: str) -> dict[str, Any]:
        """The options of one objective, the model's judges among them if it asks any."""
        own = dict(self.options.get(name, {}))
        return {"judges": self.judges, **own} if objective_spec(name).judges else own

    def spec(self, name: str) -> ObjectiveSpec:
        """What an objective declares; of one that is made already, what it is with its options."""
        return self._made[name].spec if name in self._made else objective_spec(name)

    def missing(self, names: Iterable[str]) -> dict[str, str]:
        """Make objectives; of those that cannot be made the reason, in one line."""
        out = {}
        for name in names:
            try:
                self[name]
            except UserError as error:
                out[name] = str(error)
        return out


@cache
def lacking(extra: str) -> list[str]:
    """The packages of an extra of rwopt that are not installed."""
    try:
        wanted = distribution("rwopt").requires or []
    except PackageNotFoundError:  # run from its source
        return []
    found = [Requirement(line) for line in wanted]
    mine = [r.name for r in found if r.marker is not None and r.marker.evaluate({"extra": extra})]
    return [package for package in mine if not _is_installed(package)]


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def _all() -> Iterator[Any]:
    """Families, this room's first: a name of another package never takes the place of one of these."""
    yield from families().values()
    yield from plugins()[0].values()


def _make(name: str, options: Mapping[str, Any]) -> AnyObjective:
    made: AnyObjective
    if own.is_own(name):
        made = own.make(name, **options)
        return made
    make = family_of(name).make
    takes = inspect.signature(make).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in takes):
        check_options(name, options, [p.name for p in takes][1:])
    made = make(name, **options)
    return made
