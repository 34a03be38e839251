"""What a model's judges say: edit success, kept attributes, prompt alignment, identity, realism.

`scorer.*` is the network that a search may optimise; `judge.*` is another one (seed, width, pictures) and held out.
Each embedded model has both in its folder, for pictures of its own kind; the option `judges` says whose are asked.
Probabilities are calibrated; `*_accuracy` is the share of right answers, which cannot be gained by mere confidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from rwopt.embedded import DEFAULT, FOLDERS, place_of
from rwopt.errors import UserError
from rwopt.models.judge import NETWORKS, Judge, Verdict, judge_folder
from rwopt.objectives.frozen import Frozen
from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec, against


class Panel(Frozen[Verdict]):
    """One judge, whose verdict on the same pictures is computed once for several objectives. As `Judge.load`."""

    def __init__(self, network: str, model: str = DEFAULT) -> None:
        self.judge = Judge.load(network, model)
        super().__init__(self.judge, lambda images: self.judge(images))  # looked up late: `forward` may be watched

    verdict = Frozen.__call__

    @property
    def attributes(self) -> list[str]:
        return list(self.judge.attributes)

    def wanted(self, targets: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        """The values that pictures should have as indices, {attribute: [N]}. `UserError` for what judges do not know,
        and for an attribute that is not given."""
        for name in self.attributes:
            missing = next((i for i, target in enumerate(targets) if name not in target), None)
            if missing is not None:
                raise UserError(f"target of picture {missing} lacks {name}: give {', '.join(self.attributes)}")
        return {name: self.judge.indices(name, [t[name] for t in targets]) for name in self.attributes}


@lru_cache(maxsize=4)
def panel(network: str, model: str = DEFAULT) -> Panel:
    """The shared panel of one network of one model."""
    return Panel(network, model)


def judges_of(model: str) -> str:
    """Which model's judges look at a model's pictures: its own, where its folder has both, else the default's, which
    see whether another model, such as a fine-tuned copy, draws what it draws."""
    folder = Path(place_of(model))
    return model if all((folder / network / "config.json").is_file() for network in NETWORKS) else DEFAULT


def _hit(panel: Panel, verdict: Verdict, batch: Batch, hard: bool) -> Tensor:
    """[N, A]: probability (or 0/1 for `hard`) that each attribute has its wanted value."""
    assert batch.target is not None
    columns = []
    for name, values in panel.wanted(batch.target).items():
        index = values.to(batch.images.device)
        if hard:
            columns.append((verdict.logits[name].argmax(-1) == index).float())
        else:
            columns.append(verdict.probability(name, index))
    return torch.stack(columns, 1)


def _mask(panel: Panel, batch: Batch, which: str) -> Tensor:
    """[N, A] of 0/1: the attributes to average over: `all` visible ones, the `changed` or the `kept` ones."""
    rows = []
    for i in range(len(batch.images)):
        hidden = batch.hidden[i] if batch.hidden else []
        changed = batch.changed[i] if batch.changed else []
        rows.append([
            float(n not in hidden and (which == "all" or (n in changed) == (which == "changed")))
            for n in panel.attributes
        ])  # fmt: skip
    return torch.tensor(rows, device=batch.images.device)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[N] from [N, A]; NaN where the mask is empty, nothing to judge. (0/0 would make the gradient NaN too.)"""
    count = mask.sum(1)
    return torch.where(count > 0, (values * mask).sum(1) / count.clamp(min=1), torch.nan)


def _mean_hit(judges: Panel, which: str, hard: bool) -> Callable[[Batch], Tensor]:
    def score(batch: Batch) -> Tensor:
        mask = _mask(judges, batch, which)
        hit = _hit(judges, judges.verdict(batch.images), batch, hard)
        return _masked_mean(hit, mask)

    return score


def _success(judges: Panel, hard: bool) -> Callable[[Batch], Tensor]:
    """How much of the wanted change was made: 0 for an untouched source by construction, 1 for certainty."""

    def score(batch: Batch) -> Tensor:
        assert batch.reference is not None
        mask = _mask(judges, batch, "changed")
        after = _hit(judges, judges.verdict(batch.images), batch, hard)
        before = _hit(judges, judges.verdict(batch.reference), batch, hard)
        gain = ((after - before) / (1 - before).clamp(min=1e-3)).clamp(0, 1)
        return _masked_mean(gain, mask)

    return score


def _identity(judges: Panel) -> Callable[[Batch], Tensor]:
    def score(batch: Batch) -> Tensor:
        assert batch.reference is not None
        first, second = judges.verdict(batch.images).embedding, judges.verdict(batch.reference).embedding
        return (first * second).sum(1).clamp(0, 1)

    return score


def _realism(judges: Panel) -> Callable[[Batch], Tensor]:
    def score(batch: Batch) -> Tensor:
        return judges.verdict(batch.images).realism.sigmoid()

    return score


def feature_distance(judges: Panel, images: Tensor, other: Tensor) -> Tensor:
    """Relative L2 distance [N] of a judge's last features of pictures [N, 3, H, W] to those of `other`."""
    a, b = judges.verdict(images).features, judges.verdict(other).features
    relative: Tensor = (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-6)
    return relative


# suffix -> (factory, differentiable, needs, higher is better, what it is)
_KINDS: dict[str, tuple[Callable[[Panel], Callable[[Batch], Tensor]], bool, tuple[str, ...], bool, str]] = {
    "success": (lambda p: _success(p, False), True, ("reference", "target", "changed"), True,
                "probability gained by the wanted value of the edited attribute"),
    "success_accuracy": (lambda p: _success(p, True), False, ("reference", "target", "changed"), True,
                         "share of edits whose wanted value is the judge's answer"),
    "kept": (lambda p: _mean_hit(p, "kept", False), True, ("target", "changed"), True,
             "mean probability of the attributes that must stay"),
    "kept_accuracy": (lambda p: _mean_hit(p, "kept", True), False, ("target", "changed"), True,
                      "share of the attributes that must stay which the judge reads right"),
    "alignment": (lambda p: _mean_hit(p, "all", False), True, ("target",), True,
                  "mean probability of the caption's attributes"),
    "accuracy": (lambda p: _mean_hit(p, "all", True), False, ("target",), True,
                 "share of the caption's attributes which the judge reads right"),
    "identity": (_identity, True, ("reference",), True, "cosine of the identity embeddings of picture and reference"),
    "realism": (_realism, True, (), True, "probability of a true picture rather than a model's failure"),
    "distance": (lambda p: against("truth", partial(feature_distance, p)), True, ("truth",), False,
                 "relative feature distance to the true edit"),
}  # fmt: skip


def specs(judges: str = DEFAULT) -> Mapping[str, ObjectiveSpec]:
    """What each objective declares. Raises `UserError` for a model without judges."""
    return {spec.name: spec for network in NETWORKS for spec in _specs(network, judges)}


def _specs(network: str, judges: str) -> Iterator[ObjectiveSpec]:
    size = (judge_folder(network, judges) / "model.safetensors").stat().st_size
    weights = f"{judges}/{network}" + ", embedded" * (judges in FOLDERS)
    for kind, (_, differentiable, needs, higher, about) in _KINDS.items():
        span = (0.0, 1.0 if higher else float("inf"))
        yield ObjectiveSpec(
            f"{network}.{kind}", higher, differentiable, span, frozenset(needs), about=about, weights=weights,
            size=size, judges=judges,
        )  # fmt: skip


def make(name: str, judges: str = DEFAULT) -> Objective:
    """The objective of that name. judges: whose are asked, the name of an embedded model or a folder that has some."""
    network, kind = name.split(".")
    return Objective(specs(judges)[name], _KINDS[kind][0](panel(network, judges)))
