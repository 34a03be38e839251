"""A reward of one's own: `objective.terms: {path/to/file.py:function: 1.0}`.

The function takes pictures [N, 3, H, W] in [0, 1] and a `Batch`, and gives a tensor of N scores. It may have an
attribute `spec`, a mapping of what is not as here: higher_is_better (true), range (no ends), differentiable (false),
needs (none), nan (false: a NaN is an error; true: it means that the picture has no score), licence, weights, about.
`objective.options: {path/to/file.py:function: {key: value}}` are given to it as keywords.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwopt.errors import UserError, one_of
from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec, check_options

KEYS = ("higher_is_better", "range", "differentiable", "needs", "nan", "licence", "weights", "about")
Function = Callable[..., Tensor]


def is_own(name: str) -> bool:
    """Whether a name means a function in a file."""
    return name.rpartition(":")[0].endswith(".py")


def spec_of(name: str) -> ObjectiveSpec:
    """What the function declares; its version is that of its file. Raises `UserError` as `make` does."""
    path, _, _ = name.rpartition(":")
    about, said = _declared(name), inspect.getdoc(_function(name)) or "a function of your own"
    span = about.get("range", (-math.inf, math.inf))
    numbers = isinstance(span, list | tuple) and len(span) == 2 and all(isinstance(x, int | float) for x in span)
    if not numbers or not span[0] < span[1]:
        raise UserError(f"{name}: spec has range {span}: give two ascending numbers, (low, high)")
    return ObjectiveSpec(
        name,
        bool(about.get("higher_is_better", True)),
        bool(about.get("differentiable", False)),
        (float(span[0]), float(span[1])),
        frozenset(about.get("needs", ())),
        licence=str(about.get("licence", "your own")),
        about=str(about.get("about", said.partition("\n")[0])),
        weights=str(about.get("weights", "")),
        version=hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12],
    )


def make(name: str, **options: Any) -> Objective:
    """The objective of a function.

    Raises `UserError` where there is no such file or function, where the file cannot be run or takes no such options;
    and when it is called, if it raises an error itself, gives no N numbers, or NaN that its spec does not allow.
    """
    function, allowed, spec = _function(name), bool(_declared(name).get("nan")), spec_of(name)
    takes = list(inspect.signature(function).parameters.values())
    if not any(p.kind is p.VAR_KEYWORD for p in takes):
        check_options(name, options, [p.name for p in takes if p.kind is not p.VAR_POSITIONAL][2:])

    def score(batch: Batch) -> Tensor:
        try:
            scores = function(batch.images, batch, **options)
        except Exception as error:
            raise UserError(f"{name} failed: {_told(error)}: mend the function") from error
        count = len(batch.images)
        if not isinstance(scores, Tensor) or scores.shape != (count,) or scores.is_complex():
            got = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise UserError(f"{name} gave {got} for {count} pictures: return a tensor of {count} numbers")
        if not scores.is_floating_point():
            scores = scores.float()
        if not allowed and bool(scores.isnan().any()):
            raise UserError(f"{name} gave NaN: return a number for each picture, or allow it: function.spec = "
                            "{'nan': True}")  # fmt: skip
        if spec.differentiable and torch.is_grad_enabled() and batch.images.requires_grad and not scores.requires_grad:
            raise UserError(f"{name} has no gradient, as its spec says: leave out differentiable")
        return scores

    return Objective(spec, score)


def _declared(name: str) -> Mapping[str, Any]:
    about = getattr(_function(name), "spec", {})
    if not isinstance(about, Mapping):
        raise UserError(f"{name}: spec is no mapping: write function.spec = {{'range': (0, 1)}}")
    for key in about:
        one_of(KEYS, f"{name}: spec", str(key))
    return about


def _function(name: str) -> Function:
    path, _, attribute = name.rpartition(":")
    place = Path(path)
    if not place.is_file():
        raise UserError(f"objective {name}: there is no file {place.absolute()}: give the path of a .py file")
    return _loaded(name, str(place.absolute()), attribute, place.stat().st_mtime_ns)


@cache
def _loaded(name: str, path: str, attribute: str, changed: int) -> Function:
    """The function, of a file that is run once unless it has changed."""
    module = _run(name, path, changed)
    function = getattr(module, attribute, None)
    if not callable(function):
        there = sorted(n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__)
        remedy = f"it has {', '.join(there)}" if there else "it has none"
        raise UserError(f"objective {name}: {path} has no function {attribute}: {remedy}")
    made: Function = function
    return made


@cache
def _run(name: str, path: str, changed: int) -> Any:
    found = importlib.util.spec_from_file_location(f"rwopt_own_{hashlib.sha256(path.encode()).hexdigest()[:8]}", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"objective {name}: {path} cannot be run: {_told(error)}: mend the file") from error
    return module


def _told(error: BaseException) -> str:
    """An error of somebody else's code in one line, with the line of the code where it came up."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" (line {trace.tb_lineno} of {Path(trace.tb_frame.f_code.co_filename).name})" if trace else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"
