"""What the embedded model's judges say: edit success, kept attributes, prompt alignment, identity, realism.

`scorer.*` is the network that a search may optimise; `judge.*` is another one (seed, width, pictures) and held out.
Probabilities are calibrated; `*_accuracy` is the share of right answers, which cannot be gained by mere confidence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models.judge import Judge, Verdict
from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec, against

NETWORKS = ("scorer", "judge")


class Panel:
    """One judge with a memory of the last three sets of pictures, so that several objectives cost one forward pass."""

    def __init__(self, network: str) -> None:
        self.judge = Judge.load(network)
        self._seen: list[tuple[Tensor, Verdict]] = []

    def verdict(self, images: Tensor) -> Verdict:
        """What the judge says of `images`, computed once for the same pictures (not while taking gradients)."""
        self.judge.to(images.device)
        verdict: Verdict
        if images.requires_grad and torch.is_grad_enabled():
            verdict = self.judge(images.float())
            return verdict
        # Own copies, compared by content (a hundredth of a forward pass): a tensor may be changed in place, and neither
        # its identity nor its version counter tells when that happened through NumPy.
        for i, (copy, verdict) in enumerate(self._seen):
            if copy.device == images.device and copy.dtype == images.dtype and torch.equal(copy, images):
                self._seen.append(self._seen.pop(i))
                return verdict
        with torch.no_grad():
            verdict = self.judge(images.float())
        self._seen = [*self._seen[-2:], (images.detach().clone(), verdict)]
        return verdict

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


def names() -> list[str]:
    return [f"{network}.{kind}" for network in NETWORKS for kind in _KINDS]


def make(name: str) -> Objective:
    network, kind = name.split(".")
    factory, differentiable, needs, higher, about = _KINDS[kind]
    top = 1.0 if higher else float("inf")
    spec = ObjectiveSpec(name, higher, differentiable, (0.0, top), frozenset(needs), about=about)
    return Objective(spec, factory(network))
