"""What a finished search says: which columns its tables have, and plain sentences about paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rwopt.config import Settings
from rwopt.objectives import ObjectiveSpec, objective_spec
from rwopt.objectives.composite import Composite
from rwopt.results import Metric, Paired
from rwopt.search.evaluation import HELD_OUT, OBJECTIVE


def report_metrics(settings: Settings) -> list[Metric]:
    """The optimised objective, the same by the held-out judge, and the recipe's own columns."""
    judged = any(name.startswith("scorer.") for name in settings.objective.terms)  # else there is no second opinion
    columns = [Metric(OBJECTIVE, True, True, _format(settings))] + [Metric(HELD_OUT, False)] * judged
    for name, optimised in settings.objective.report.items():
        spec = objective_spec(name)
        columns.append(Metric(name, optimised, spec.higher_is_better, _digits(spec)))
    return columns


def _digits(spec: ObjectiveSpec) -> str:
    decibels = spec.higher_is_better and spec.range[1] > 1
    return ".2f" if decibels else ".3f"


def _format(settings: Settings) -> str:
    wanted = settings.objective
    composite = Composite(wanted.terms, combine=wanted.combine)
    return ".3f" if composite.calibrated else _digits(next(iter(composite.specs.values())))


def headline(settings: Settings) -> list[str]:
    """The two metrics whose paired differences the terminal shows; the page has them all."""
    names = [m.name for m in report_metrics(settings)]
    return names[:2] if HELD_OUT in names else names[:4]


def explain(settings: Settings) -> str:
    """What the two headline metrics are, for somebody who did not write the recipe."""
    terms = ", ".join(n if w == 1 else f"{n} (weight {w:g})" for n, w in settings.objective.terms.items())
    wanted = settings.objective
    held_out = any(name.startswith("scorer.") for name in wanted.terms)
    second = f"{HELD_OUT}: the same from a judge that it never saw." if held_out else "Others: held-out evidence."
    if Composite(wanted.terms, combine=wanted.combine).calibrated:
        return (f"{OBJECTIVE}: what the search saw, the sum of {terms}, each as standard deviations above the plain "
                f"model's mean on train cases. {second}")  # fmt: skip
    if len(wanted.terms) == 1:
        name = next(iter(wanted.terms))
        about = f"{name}: {objective_spec(name).about}"
        return f"{OBJECTIVE}: what the search saw, {about}. judge.*: by a network it never saw."
    return f"{OBJECTIVE}: what the search saw, the geometric mean of {terms}. {second}"


def verdict(paired: Sequence[Paired]) -> list[str]:
    """Plain sentences: learned against analytic, what weights add, what time adds; ties are called ties."""

    def said(a: str, b: str, question: str) -> str:
        row = next((p for p in paired if (p.a, p.b, p.metric) == (a, b, OBJECTIVE)), None)
        if row is None:  # an arm that the recipe does not compare
            return ""
        held = [p for p in paired if (p.a, p.b) == (a, b) and not p.optimised]
        ups = [p.metric for p in held if better(p) > 0]
        downs = [p.metric for p in held if better(p) < 0]
        moved = [f"better on {', '.join(ups)}"] * bool(ups) + [f"worse on {', '.join(downs)}"] * bool(downs)
        same = len(held) - len(ups) - len(downs)
        moved += [f"no clear difference on {same if moved else f'any of {same}'}"] * bool(same)
        word = {1: "better", 0: "no clear difference", -1: "worse"}[better(row)]
        p = "< 0.001" if row.p < 0.001 else f"= {row.p:.2g}"
        return (
            f"{question}: {word} on the objective, {row.mean:+.4f} (95 % interval {row.low:+.4f} to {row.high:+.4f}; "
            f"wins {row.win_rate:.0%} of {row.cases} cases, p {p}). Held out: {'; '.join(moved)}."
        )

    sentences = [
        said("learned", "best solver", "Learned against the best plain sampler and grid"),
        said("learned", "sampler dials", "Learned against all of the sampler's dials (what block weights add)"),
        said("learned", "analytic", "Learned against the published analytic schedule"),
        said("learned", "best guidance", "Learned against tuned guidance without weights"),
        said("learned", "constant", "Learned against constant weights (what time dependence adds)"),
    ]
    return [sentence for sentence in sentences if sentence]


def shares(valid: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A sentence for each metric that not all pictures have a score for; valid: {metric: {arm: share}}."""
    lines = []
    for metric, arms in valid.items():
        if min(arms.values(), default=1.0) < 1:
            told = ", ".join(f"{share:.1%} of {arm}'s" for arm, share in arms.items())
            lines.append(f"{metric} has a score for {told} pictures; the others take no part in its mean.")
    return lines


def better(row: Paired) -> int:
    """+1 where a is better with its interval off zero, -1 where it is worse, else 0 (with regard to the direction)."""
    up = row.metric in (OBJECTIVE, HELD_OUT) or objective_spec(row.metric).higher_is_better
    sign = 1 if up else -1
    if row.low > 0:
        return sign
    return -sign if row.high < 0 else 0
