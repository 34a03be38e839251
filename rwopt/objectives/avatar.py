"""What the embedded model's judges say: edit success, kept attributes, prompt alignment, identity, realism.

`scorer.*` is the network that a search may optimise; `judge.*` is another one (seed, width, pictures) and held out.
Probabilities are calibrated; `*_accuracy` is the share of right answers, which cannot be gained by mere confidence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import EMBEDDED
from rwopt.models.judge import Judge, Verdict
from rwopt.objectives.frozen import Frozen
from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec, against

NETWORKS = ("scorer", "judge")


class Panel(Frozen[Verdict]):
    """One judge, whose verdict on the same pictures is computed once for several objectives."""

    def __init__(self, network: str) -> None:
        self.judge = Judge.load(network)
        super().__init__(self.judge, lambda images: self.judge(images))  # looked up late: `forward` may be watched

    verdict = Frozen.__call__

    def indices(self, attribute: str, values: list[str]) -> Tensor:
        return self.judge.indices(attribute, values)

    @property
    def attributes(self) -> list[str]:
        return list(self.judge.attributes)


@lru_cache(maxsize=4)
def panel(network: str) -> Panel:
    """The shared panel of one network."""
    return Panel(network)


def _hit(panel: Panel, verdict: Verdict, batch: Batch, hard: bool) -> Tensor:
    """[N, A]: probability (or 0/1 for `hard`) that each attribute has its wanted value."""
    assert batch.target is not None
    columns = []
    for name in panel.attributes:
        missing = [i for i, t in enumerate(batch.target) if name not in t]
        if missing:
            raise UserError(f"target of picture {missing[0]} lacks {name}: give {', '.join(panel.attributes)}")
        index = panel.indices(name, [t[name] for t in batch.target]).to(batch.images.device)
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


def _mean_hit(network: str, which: str, hard: bool) -> Callable[[Batch], Tensor]:
    def score(batch: Batch) -> Tensor:
        judges = panel(network)
        mask = _mask(judges, batch, which)
        hit = _hit(judges, judges.verdict(batch.images), batch, hard)
        return _masked_mean(hit, mask)

    return score


def _success(network: str, hard: bool) -> Callable[[Batch], Tensor]:
    """How much of the wanted change was made: 0 for an untouched source by construction, 1 for certainty."""

    def score(batch: Batch) -> Tensor:
        judges = panel(network)
        assert batch.reference is not None
        mask = _mask(judges, batch, "changed")
        after = _hit(judges, judges.verdict(batch.images), batch, hard)
        before = _hit(judges, judges.verdict(batch.reference), batch, hard)
        gain = ((after - before) / (1 - before).clamp(min=1e-3)).clamp(0, 1)
        return _masked_mean(gain, mask)

    return score


def _identity(network: str) -> Callable[[Batch], Tensor]:
    def score(batch: Batch) -> Tensor:
        judges = panel(network)
        assert batch.reference is not None
        first, second = judges.verdict(batch.images).embedding, judges.verdict(batch.reference).embedding
        return (first * second).sum(1).clamp(0, 1)

    return score


def _realism(network: str) -> Callable[[Batch], Tensor]:
    def score(batch: Batch) -> Tensor:
        return panel(network).verdict(batch.images).realism.sigmoid()

    return score


def feature_distance(network: str, images: Tensor, other: Tensor) -> Tensor:
    """Relative L2 distance [N] of a judge's last features of pictures [N, 3, H, W] to those of `other`."""
    a, b = panel(network).verdict(images).features, panel(network).verdict(other).features
    relative: Tensor = (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-6)
    return relative


# suffix -> (factory, differentiable, needs, higher is better, what it is)
_KINDS: dict[str, tuple[Callable[[str], Callable[[Batch], Tensor]], bool, tuple[str, ...], bool, str]] = {
    "success": (lambda n: _success(n, False), True, ("reference", "target", "changed"), True,
                "probability gained by the wanted value of the edited attribute"),
    "success_accuracy": (lambda n: _success(n, True), False, ("reference", "target", "changed"), True,
                         "share of edits whose wanted value is the judge's answer"),
    "kept": (lambda n: _mean_hit(n, "kept", False), True, ("target", "changed"), True,
             "mean probability of the attributes that must stay"),
    "kept_accuracy": (lambda n: _mean_hit(n, "kept", True), False, ("target", "changed"), True,
                      "share of the attributes that must stay which the judge reads right"),
    "alignment": (lambda n: _mean_hit(n, "all", False), True, ("target",), True,
                  "mean probability of the caption's attributes"),
    "accuracy": (lambda n: _mean_hit(n, "all", True), False, ("target",), True,
                 "share of the caption's attributes which the judge reads right"),
    "identity": (_identity, True, ("reference",), True, "cosine of the identity embeddings of picture and reference"),
    "realism": (_realism, True, (), True, "probability of a drawn avatar rather than a model's failure"),
    "distance": (lambda n: against("truth", partial(feature_distance, n)), True, ("truth",), False,
                 "relative feature distance to the true edit"),
}  # fmt: skip


def specs() -> Mapping[str, ObjectiveSpec]:
    """What each objective declares."""
    out = {}
    for network in NETWORKS:
        place = EMBEDDED / network / "model.safetensors"
        given: dict[str, Any] = {"weights": f"avatars/{network}, embedded", "size": place.stat().st_size}
        for kind, (_, differentiable, needs, higher, about) in _KINDS.items():
            name, top = f"{network}.{kind}", 1.0 if higher else float("inf")
            out[name] = ObjectiveSpec(name, higher, differentiable, (0.0, top), frozenset(needs), about=about, **given)
    return out


def make(name: str) -> Objective:
    """The objective of that name."""
    network, kind = name.split(".")
    return Objective(specs()[name], _KINDS[kind][0](network))
