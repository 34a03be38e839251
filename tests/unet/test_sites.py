"""Sites: names, order, groups and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from helpers.twins import NETS, make

from rwopt.errors import UserError
from rwopt.models.configuration import empty_unet
from rwopt.unet.attachment import Attachment
from rwopt.unet.names import foreign_names, names_of, site_rows
from rwopt.unet.sites import ALL_KINDS, KINDS, SITE_KINDS, find_sites, group_sites, list_sites

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
    assert [site.factor for site in sites] == [1, 1, 2, 2, 4, 4, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1]
    assert [site.id for site in sites if site.inert] == ["up_blocks.3.attentions.2"]
    numbers = [1, 2, 4, 5, 7, 8, None, *range(3, 12)]
    names = [names_of(unet, site) for site in sites]
    lbw = [f"IN{n:02d}" for n in numbers[:6]] + ["M00"] + [f"OUT{n:02d}" for n in numbers[7:]]
    ldm = [f"input_blocks.{n}.1" for n in numbers[:6]] + ["middle_block.1"]
    assert [name.lbw for name in names] == lbw
    assert [name.ldm for name in names] == ldm + [f"output_blocks.{n}.1" for n in numbers[7:]]
    assert [name.comfy for name in names][5:8] == [("input", 8), ("middle", 0), ("output", 3)]
    assert [name.lora for name in names][5:8] == ["down.block_2.1", "mid", "up.block_1.0"]
    skips = list_sites(unet, ("skip",))
    assert [site.channels for site in skips] == [1280] * 5 + [640, 640, 640, 320, 320, 320, 320]
    assert [names_of(unet, site).comfy for site in skips] == [("output", n) for n in range(12)]


def test_names_of_unequal_blocks_count_layers() -> None:
    assert foreign_names("down_blocks.2.resnets.1", "resnet", [1, 3, 2], [3, 4, 2]).ldm == "input_blocks.8.0"
    assert foreign_names("up_blocks.1.attentions.0", "transformer", [1, 3, 2], [3, 4, 2]).ldm == "output_blocks.3.1"
    assert foreign_names("mid_block.resnets.1", "resnet", [1], [2]).ldm == "middle_block.2"


def test_rows_for_people(tiny_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    tiny_unet.save_config(tmp_path / "pipe" / "unet")
    rows = site_rows(empty_unet(tmp_path / "pipe"))
    assert rows == site_rows(tiny_unet) == site_rows(empty_unet(tmp_path / "pipe" / "unet"))
    first = next(row for row in rows if row["kind"] == "transformer")
    assert first["id"] == "down_blocks.0.attentions.0"
    assert (first["ldm"], first["comfy"], first["lbw"], first["lora"]) == (
        "input_blocks.1.1",
        "input 1",
        "IN01",
        "down.block_0.0",
    )
    assert [row["id"] for row in rows if row["note"]] == ["up_blocks.2.attentions.1"]
    with pytest.raises(UserError, match="holds no U-Net"):
        empty_unet(tmp_path)


@torch.no_grad()
def test_an_inert_site_does_nothing_in_mode_output(tiny_unet: UNet2DConditionModel) -> None:
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12)
    plain = tiny_unet(x, 10, text).sample
    for site in list_sites(tiny_unet, ("transformer", "resnet")):
        with Attachment(tiny_unet, [site.id], "output") as attachment:
            change = (attachment(x, 10, text, torch.tensor([1.3])) - plain).abs().max() / plain.abs().max()
        assert (change < 1e-3) == site.inert, site.id


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_every_class_lists_its_places_in_the_order_of_execution(name: str) -> None:
    twin, order = make(name), []
    sites = list_sites(twin.unet, ("transformer", "resnet"))
    for path in {site.path for site in sites}:
        twin.unet.get_submodule(path).register_forward_hook(lambda *_, path=path: order.append(path))
    twin()
    assert order == [site.path for site in sites]


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
    sites = list_sites(unet)
    assert [site.id for site in sites] == SDXL_ORDER
    assert len(list_sites(unet, KINDS)) == 44
    assert [site.kind for site in list_sites(unet, SITE_KINDS)].count("resnet") == 17
    assert not any(site.inert for site in sites), "its last transformer is followed by an attention-free block"
    assert [site.id for site in list_sites(unet, ("resnet",)) if site.inert] == ["up_blocks.2.resnets.2.resnet"]
    names = [names_of(unet, site) for site in sites]
    lbw = "IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"
    assert [name.lbw for name in names] == lbw.split()
    assert names[0].ldm == "input_blocks.4.1"
    assert names[4].ldm == "middle_block.1"


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
    with pytest.raises(UserError, match="'block' is unknown"):
        list_sites(tiny_unet, ("block",))
    with pytest.raises(UserError, match="'colour' is unknown"):
        group_sites(list_sites(tiny_unet), "colour")
    plain = UNet2DModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        attention_head_dim=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    with pytest.raises(UserError, match="UNet2DModel has no site of kind transformer"):
        list_sites(plain)


@pytest.mark.parametrize("by", ["site", "block", "stage", "kind", "stage_kind", "block_kind", "all"])
def test_groups_partition_the_sites(tiny_unet: UNet2DConditionModel, by: str) -> None:
    sites = list_sites(tiny_unet, ALL_KINDS)
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
