"""Folding into single files of LDM's layout: against hooks, after diffusers' own conversion, and byte for byte."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.families import UNETS, save_family, save_single_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rwopt.errors import UserError
from rwopt.export import export
from rwopt.export.checkpoint import _layers
from rwopt.schedule import Schedule
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites

FOLDABLE = ("transformer", "self", "cross", "ff", "resnet")
WORDS = {"transformer": ".proj_out.", "self": ".attn1.to_out.0.", "cross": ".attn2.to_out.0.", "ff": ".ff.net.2.",
         "resnet": ".out_layers.3."}  # fmt: skip


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder and the same model as one file."""
    place = tmp_path_factory.mktemp(request.param)
    folder = save_family(request.param, place / "folder")
    return folder, save_single_file(folder, place / "model.safetensors")


def schedule_for(unet: Any, kinds: tuple[str, ...] = FOLDABLE) -> Schedule:
    names = [site.id for site in list_sites(unet, kinds)]
    weights = np.random.default_rng(0).uniform(0.2, 1.8, (1, len(names)))
    weights[0, :2] = 1, 0
    return Schedule(tuple(names), [1.0], weights)  # type: ignore[arg-type]


def call(unet: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    config, given = unet.config, {}
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(2, pooled, generator=draw), "time_ids": torch.ones(2, 6)}
        given = {"added_cond_kwargs": added}
    text = torch.randn(2, 5, config.cross_attention_dim, generator=draw)
    return (torch.randn(2, 4, 8, 8, generator=draw), 500, text), given


def opened(path: Path, folder: Path) -> Any:
    """By diffusers' own conversion."""
    return UNet2DConditionModel.from_single_file(str(path), config=str(folder), subfolder="unet").eval()


def raw(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    with safe_open(path, "pt") as file:
        names = [*file.keys()]
    tensors = load_file(path)
    found = {name: tensors[name] for name in names}
    return {n: (str(t.dtype), [*t.shape], t.view(torch.uint8).numpy().tobytes()) for n, t in found.items()}


@torch.no_grad()
def test_a_folded_file_gives_what_hooks_give_and_all_else_keeps_its_bytes(
    twin: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, file = twin
    unet = opened(file, folder)
    schedule = schedule_for(unet)
    args, given = call(unet)
    plain = unet(*args, **given).sample
    with Attachment(unet, schedule.sites) as attachment:
        expected = attachment(*args, torch.tensor(schedule.weights[0], dtype=torch.float32), **given)
    assert export(schedule, "fold", tmp_path / "new.safetensors", unet=str(file)) == [tmp_path / "new.safetensors"]
    folded = opened(tmp_path / "new.safetensors", folder)
    got = folded(*args, **given).sample
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-3)

    folded.save_pretrained(tmp_path / "unet")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    torch.testing.assert_close(again(*args, **given).sample, expected, rtol=1e-5, atol=1e-5)

    before, after = raw(file), raw(tmp_path / "new.safetensors")
    assert [*before] == [*after]
    changed = {name for name in before if before[name] != after[name]}
    inner = [name.removeprefix("model.diffusion_model.") for name in changed]
    assert len({re.sub(r"transformer_blocks.*|\d+\.(weight|bias)|proj_out.*", "", name) for name in inner}) > 5
    assert all(name.startswith("model.diffusion_model.") for name in changed)
    assert all(any(word in name for word in WORDS.values()) for name in changed)
    with safe_open(tmp_path / "new.safetensors", "pt") as made:
        assert Schedule.from_dict(json.loads(made.metadata()["rwopt.schedule"])) == schedule


def test_each_site_is_found_under_its_name(twin: tuple[Path, Path], tmp_path: Path) -> None:
    """A power of two for each site, looked for under diffusers' names after its conversion."""
    folder, file = twin
    unet = opened(file, folder)
    sites = list_sites(unet, FOLDABLE)
    weights = 0.5 ** np.arange(1, len(sites) + 1)
    schedule = Schedule(tuple(site.id for site in sites), [1.0], weights[None])  # type: ignore[arg-type]
    export(schedule, "fold", tmp_path / "new.safetensors", unet=file)
    after = opened(tmp_path / "new.safetensors", folder).state_dict()
    ends = {**WORDS, "resnet": ".conv2."}
    scale = {
        name: weight
        for site, weight in zip(sites, weights.tolist(), strict=True)
        for name in after
        if name.startswith(f"{site.path}.") and ends[site.kind] in name
    }
    assert len(scale) >= 2 * len(sites)
    for name, before in unet.state_dict().items():
        assert torch.equal(after[name], before * scale.get(name, 1.0)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    names = ["input_blocks.0.0.weight", "middle_block.1.proj_out.weight", "other"]
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(7, 3, generator=draw).to(dtype) for name in names}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "note": "x" * 5000})
    schedule = Schedule.constant(["mid_block.attentions.0"], [1.0], 1 / 3)
    for _ in range(2):  # the second one takes the place of the first
        export(schedule, "fold", tmp_path / "b.safetensors", unet=tmp_path / "a.safetensors")
    made = load_file(tmp_path / "b.safetensors")
    assert torch.equal(made[names[1]], (tensors[names[1]].double() / 3).to(dtype))
    assert all(torch.equal(made[name], tensors[name]) for name in (names[0], "other"))
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["note"] == "x" * 5000


def test_layers_are_counted_on_the_file() -> None:
    """SD 1.5, SDXL and blocks of unequal depth."""
    sd = [f"input_blocks.{n}.0.op.weight" for n in (3, 6, 9)] + ["input_blocks.11.0.x"]
    sd += [f"output_blocks.{n}.{j}.conv.weight" for n, j in ((2, 1), (5, 2), (8, 2))] + ["output_blocks.11.0.x"]
    assert (_layers(sd, "input", r"0\.op"), _layers(sd, "output", r"\d\.conv")) == ([2, 2, 2, 2], [3, 3, 3, 3])
    odd = ["input_blocks.2.0.op.weight", "input_blocks.5.0.x", "output_blocks.3.2.conv.weight", "output_blocks.5.0.x"]
    assert (_layers(odd, "input", r"0\.op"), _layers(odd, "output", r"\d\.conv")) == ([1, 3], [4, 2])


def test_what_cannot_be_folded_into_a_file_is_refused(tmp_path: Path) -> None:
    names = ["input_blocks.0.0.weight", "input_blocks.1.1.proj_out.weight", "middle_block.1.proj_out.weight"]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "a.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    small = {name: torch.ones(2, 2).to(torch.float8_e4m3fn) for name in names}
    save_file(small, tmp_path / "small.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "old.ckpt").write_bytes(b"x")
    site = "mid_block.attentions.0"
    before = sorted(path.name for path in tmp_path.iterdir())

    def refused(says: str, source: str = "a.safetensors", out: str = "new.safetensors", **fields: Any) -> None:
        schedule = Schedule.constant([fields.pop("site", site)], [1.0], 0.5, **fields)
        with pytest.raises(UserError, match=says) as error:
            export(schedule, "fold", tmp_path / out, unet=tmp_path / source)
        assert "\n" not in str(error.value)

    refused(f"op.mode is 'output' at site {site}", mode="output")
    refused("site up_blocks.0.resnets.0.skip cannot be folded", site="up_blocks.0.resnets.0.skip")
    refused(r"1 of 1 sites are absent from .*\(down_blocks.0.attentions.1\)", site="down_blocks.0.attentions.1")
    refused("1 of 1 sites are absent", site="down_blocks.3.attentions.0")
    refused(f"1 of 1 sites are absent from .*{site}.cross", site=f"{site}.cross")
    refused(f"site {site} has weights of type F8_E4M3", source="small.safetensors")
    refused("has no U-Net in LDM's layout", source="other.safetensors")
    refused("is no .safetensors file", source="text.safetensors")
    refused("a .ckpt may run anything", source="old.ckpt")
    refused("cannot be read", source="absent.safetensors")
    refused("out=.*: a single file is written as one", out="folder")
    refused("is there and no export of rwopt|is the file to read", out="a.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    UNet2DConditionModel(**UNETS["sd1"]).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="is a single file, which is made of one"):
        export(Schedule.constant([site], [1.0]), "fold", tmp_path / "x.safetensors", unet=tmp_path / "unet")
