"""A schedule carried over to another U-Net: by name, by depth, never unasked."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from helpers.small import make_tiny_unet
from helpers.twins import make

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.actions import Actions
from rwopt.unet.apply import apply
from rwopt.unet.mapping import map_schedule
from rwopt.unet.sites import list_sites

NOISE = {"beta_schedule": "scaled_linear"}


def ramp(unet: torch.nn.Module, kinds: tuple[str, ...] = ("transformer", "ff")) -> Schedule:
    ids = [site.id for site in list_sites(unet, kinds)]
    table = np.linspace(0.5, 1.5, 2 * len(ids)).reshape(2, -1)
    return Schedule(tuple(ids), np.array([9.0, 0.2]), table, noise=NOISE, model={"unet_class": type(unet).__name__})


def test_by_name_from_pictures_to_video_and_only_on_request() -> None:
    still, video = make("sd"), make("motion")
    schedule = ramp(still.unet)
    with pytest.raises(UserError, match=r"UNet2DConditionModel .*, this is a UNetMotionModel .*: map it") as error:
        apply(video.unet, schedule)
    for part in (f"({schedule.sites[0]}, ", "8 in all), this is a", "up_blocks.1.attentions.1)"):  # of both, in short
        assert part in str(error.value)
    mapped = map_schedule(schedule, video.unet)
    assert mapped.sites == schedule.sites
    assert np.array_equal(mapped.weights, schedule.weights)
    assert mapped.provenance["mapped"]["digest"] == schedule.digest()
    with apply(SimpleNamespace(unet=video.unet, scheduler=DDIMScheduler(**NOISE)), mapped):
        assert torch.isfinite(video()).all()


def test_by_depth_warns_and_interpolates() -> None:
    large = make_tiny_unet(layers_per_block=2)
    small = make_tiny_unet(layers_per_block=1)
    schedule = ramp(large)
    with pytest.raises(UserError, match="are absent"):
        map_schedule(schedule, small)
    with pytest.warns(UserWarning, match="by relative depth"):
        mapped = map_schedule(schedule, small, by="depth")
    assert list(mapped.sites) == [site.id for site in list_sites(small, ("transformer", "ff"))]
    downs = [i for i, name in enumerate(schedule.sites) if name.startswith("down") and not name.endswith("ff")]
    first = mapped.sites.index("down_blocks.0.attentions.0")
    np.testing.assert_allclose(mapped.weights[:, first], schedule.weights[:, downs[:2]].mean(1))
    with pytest.warns(UserWarning, match="by relative depth"):
        same = map_schedule(schedule, large, by="depth")
    assert same.sites == schedule.sites
    np.testing.assert_allclose(same.weights, schedule.weights)


def test_what_does_not_correspond_is_refused() -> None:
    twin = make("ddpm")
    branches = ramp(make_tiny_unet(), ("cross",))
    with pytest.raises(UserError, match="no site of this UNet2DModel corresponds"):
        map_schedule(branches, twin.unet, by="depth")
    with pytest.raises(UserError, match="'luck' is unknown"):
        map_schedule(branches, twin.unet, by="luck")


def test_actions_are_carried_by_name_and_refused_by_depth() -> None:
    still, video = make("sd"), make("motion")
    schedule = replace(ramp(still.unet), actions=Actions.along((9.0, 4.0, 0.2), "FhF"))
    assert map_schedule(schedule, video.unet).actions == schedule.actions
    with pytest.raises(UserError, match=r"actions cannot be mapped by depth: .*actions=None"):
        map_schedule(schedule, video.unet, by="depth")
