"""A schedule made for one U-Net, carried over to another: on request only, never by `apply` itself.

By name: SD 1.5 onto AnimateDiff (`UNetMotionModel` has the same sites). By depth: onto pruned or other networks, as a
guess that wants to be checked.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.noise import Array
from rwopt.unet.sites import ALL_KINDS, find_sites, list_sites

if TYPE_CHECKING:
    from torch import nn


def map_schedule(schedule: Schedule, unet: nn.Module, by: str = "name") -> Schedule:
    """The schedule for `unet`.

    by: name, every site must exist there under its own name; depth, each site of the same kind on the same side (down,
    mid, up) takes the weights found at its relative depth, linearly between the schedule's sites, and a warning tells:
    between the two embedded models such weights lose up to 2.7 dB, while `steps` alone carry over (docs/emoji.md).

    Raises UserError if names are absent, or if by depth no site corresponds, or by depth for a schedule with actions:
    what a U-Net's calls can do without is its own.
    """
    kind = type(unet).__name__
    origin = {"by": by, "unet_class": schedule.model.get("unet_class"), "digest": schedule.digest()}
    if by == "name":
        find_sites(unet, schedule.sites)
        sites, weights = list(schedule.sites), schedule.weights
    elif by == "depth":
        if schedule.actions is not None:
            raise UserError("a schedule with actions cannot be mapped by depth: take its weights alone, "
                            "dataclasses.replace(schedule, actions=None)")  # fmt: skip
        sites, weights = _by_depth(schedule, unet)
        warnings.warn(
            f"a schedule of {len(schedule.sites)} sites was mapped onto {len(sites)} of this {kind} by relative depth: "
            "a guess, compare it with the plain model",
            stacklevel=2,
        )
    else:
        raise UserError(f"mapping by {by!r} is unknown: choose from name, depth")
    return Schedule(
        tuple(sites),
        schedule.sigmas,
        weights,
        mode=schedule.mode,
        interp=schedule.interp,
        model={**schedule.model, "unet_class": kind},
        noise=schedule.noise,
        calibrated=schedule.calibrated,
        provenance={**schedule.provenance, "mapped": origin},
        extra=schedule.extra,
        cfg_branch=schedule.cfg_branch,
        steps=schedule.steps,
        actions=schedule.actions,
    )


def _by_depth(schedule: Schedule, unet: nn.Module) -> tuple[list[str], Array]:
    """Site ids of `unet` and their weights [K, S]."""
    columns: dict[tuple[str, str], list[int]] = {}
    for column in sorted(range(len(schedule.sites)), key=lambda c: _order(schedule.sites[c])):
        columns.setdefault(_family(schedule.sites[column]), []).append(column)
    targets: dict[tuple[str, str], list[str]] = {}
    present = list_sites(unet, ALL_KINDS)
    for site in present:
        targets.setdefault(_family(site.id), []).append(site.id)
    found: dict[str, Any] = {}
    for family, members in columns.items():
        names = targets.get(family, [])
        depth = (np.arange(len(members)) + 0.5) / len(members)
        for index, name in enumerate(names):
            place = (index + 0.5) / len(names)
            found[name] = [np.interp(place, depth, row) for row in schedule.weights[:, members]]
    if not found:
        raise UserError(f"no site of this {type(unet).__name__} corresponds to {schedule.sites[0]} and its like")
    ordered = [site.id for site in present if site.id in found]
    return ordered, np.array([found[name] for name in ordered]).T


def _order(name: str) -> tuple[int, int, int, bool]:
    """Execution order of a site's name."""
    side = name.split("_", 1)[0]
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return ("down", "mid", "up").index(side), 0 if side == "mid" else numbers[0], numbers[-1], "attentions" in name


def _family(name: str) -> tuple[str, str]:
    """Side and kind of a site's name."""
    last = name.rsplit(".", 1)[1]
    return name.split("_", 1)[0], "transformer" if last.isdigit() else last
