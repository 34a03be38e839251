"""Sites: names, order, groups and refusals."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from rwopt.errors import UserError
from rwopt.sites import KINDS, find_sites, group_sites, list_sites

SD15_ORDER = [
    *(f"down_blocks.{i}.attentions.{j}" for i in (0, 1, 2) for j in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{i}.attentions.{j}" for i in (1, 2, 3) for j in (0, 1, 2)),
]
SDXL_ORDER = [
    *(f"down_blocks.{i}.attentions.{j}" for i in (1, 2) for j in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{i}.attentions.{j}" for i in (0, 1) for j in (0, 1, 2)),
]


def _execution_order(unet: UNet2DConditionModel, paths: dict[torch.nn.Module, str]) -> list[str]:
    order: list[str] = []
    hooks = [m.register_forward_hook(lambda m, *_: order.append(paths[m])) for m in paths]
    unet(torch.randn(1, 4, 8, 8), 10, torch.randn(1, 5, 12))
    for hook in hooks:
        hook.remove()
    return order


def test_order_is_that_of_execution(tiny_unet: UNet2DConditionModel) -> None:
    sites = list_sites(tiny_unet)
    assert len(sites) >= 7
    paths = {tiny_unet.get_submodule(site.path): site.id for site in sites}
    assert [site.id for site in sites] == _execution_order(tiny_unet, paths)


@pytest.mark.parametrize("linear", [False, True])
def test_stable_diffusion_1_and_2_have_16_sites(linear: bool) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, use_linear_projection=linear)
    sites = list_sites(unet)
    assert [site.id for site in sites] == SD15_ORDER
    assert [site.channels for site in sites] == [320] * 2 + [640] * 2 + [1280] * 6 + [640] * 3 + [320] * 3
    assert [site.stage for site in sites] == [
        site.id.replace("_blocks", "").replace("_block", "").split(".att")[0] for site in sites
    ]


def test_stable_diffusion_xl_has_11_sites() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
    assert [site.id for site in list_sites(unet)] == SDXL_ORDER
    assert len(list_sites(unet, KINDS)) == 44


def test_branch_sites_follow_their_transformer(tiny_unet: UNet2DConditionModel) -> None:
    sites = list_sites(tiny_unet, ("ff", "cross", "self"))
    assert [site.kind for site in sites] == ["self", "cross", "ff"] * len(list_sites(tiny_unet))
    assert all(site.id == f"{site.path}.{site.kind}" for site in sites)


def test_find_keeps_the_given_order(tiny_unet: UNet2DConditionModel) -> None:
    ids = [site.id for site in list_sites(tiny_unet, KINDS)][::-3]
    assert [site.id for site in find_sites(tiny_unet, ids)] == ids


def test_absent_sites_are_named_with_the_present_ones(tiny_unet: UNet2DConditionModel) -> None:
    ids = [f"down_blocks.7.attentions.{index}" for index in range(9)]
    with pytest.raises(UserError) as error:
        find_sites(tiny_unet, [*ids, "mid_block.attentions.0"])
    message = str(error.value)
    assert "9 of 10" in message
    assert ids[0] in message
    assert "up_blocks.2.attentions.1" in message
    assert "\n" not in message
    assert len(message) < 400


def test_unknown_kind_grouping_and_network_are_refused(tiny_unet: UNet2DConditionModel) -> None:
    with pytest.raises(UserError, match="'resnet' is unknown"):
        list_sites(tiny_unet, ("resnet",))
    with pytest.raises(UserError, match="'colour' is unknown"):
        group_sites(list_sites(tiny_unet), "colour")
    plain = UNet2DModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        attention_head_dim=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(UserError, match="UNet2DModel has no"):
        list_sites(plain)


@pytest.mark.parametrize("by", ["site", "block", "stage", "kind", "stage_kind", "block_kind", "all"])
def test_groups_partition_the_sites(tiny_unet: UNet2DConditionModel, by: str) -> None:
    sites = list_sites(tiny_unet, KINDS)
    groups = group_sites(sites, by)
    assert sorted(index for members in groups.values() for index in members) == list(range(len(sites)))
    assert list(groups.values()) == sorted(groups.values(), key=lambda members: members[0])


def test_group_names(tiny_unet: UNet2DConditionModel) -> None:
    sites = list_sites(tiny_unet, ("self", "cross"))
    assert list(group_sites(sites, "stage")) == ["down", "mid", "up"]
    assert list(group_sites(sites, "kind")) == ["self", "cross"]
    assert list(group_sites(sites, "block"))[:3] == ["down_blocks.0", "down_blocks.1", "mid_block"]
    assert list(group_sites(sites, "stage_kind"))[:2] == ["down.self", "down.cross"]
    assert list(group_sites(sites, "block_kind"))[:2] == ["down_blocks.0.self", "down_blocks.0.cross"]
