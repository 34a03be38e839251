"""`rwopt cost`: what it prints and writes of small models that have a configuration and no weights, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.small import make_tiny_unet
from helpers.twins import make

from rwopt.errors import UserError
from rwopt.models.call_shape import call_shape
from rwopt.models.configuration import empty_unet, random_unet
from rwopt.schedule.actions import by_letters
from rwopt.unet.cost import CostTable

VAE = {"block_out_channels": (8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 3, "norm_num_groups": 4,
       "up_block_types": ("UpDecoderBlock2D",) * 3}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def saved(folder: Path, unet: Any, vae: bool = True, tokens: int = 0) -> Path:
    """Configurations alone: a U-Net that halves latents once, a VAE of factor 4, a text encoder."""
    unet.save_config(folder / "unet")
    if vae:
        AutoencoderKL(**VAE).save_config(folder / "vae")
    if tokens:
        (folder / "text_encoder").mkdir()
        (folder / "text_encoder" / "config.json").write_text(json.dumps({"max_position_embeddings": tokens}))
    return folder


def test_it_prints_both_tables_and_writes_them(said: Any, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", make("sd", in_channels=9).unet, tokens=6)
    file = tmp_path / "new" / "cost.json"
    code, out, err = said("cost", model, "--size", 24, 40, "--rounds", 1, "--dtype", "float32", "--device", "cpu",
                          "--out", file)  # fmt: skip
    assert code == 0, err
    assert "2 rows (with guidance) for pictures of 24 x 40" in out
    assert "weights are random" in out
    assert all(word in out for word in ("down_blocks.0", "up_blocks.1", "cross", "sampling", "float32", "1 round"))
    assert len(err.splitlines()) == 1
    document = json.loads(file.read_text())
    assert document["model"] == str(model)
    table = CostTable.load(file)
    assert (table.shape, table.guided, table.dtype) == ((2, 9, 6, 10), True, "float32")
    assert sum(share["operations"] for share in document["shares"]) == pytest.approx(1)
    assert sum(share["time"] for share in document["shares"]) == pytest.approx(1)
    for action in by_letters("Fho1a23GgNnxX"):
        assert table.of(action) >= 0
    lines = [line.split() for line in out.splitlines()]
    row = next(line for line in lines if line[:2] == ["2", "b"])
    assert row[-2:] == [f"{table.operations['2']:.3f}", f"{table.time['2']:.3f}"]
    assert next(line for line in lines if line[:1] == ["F"])[-2:] == ["1.000", "1.000"]
    assert [p.name for p in file.parent.iterdir()] == ["cost.json"]


def test_without_guidance_no_action_is_on_it(said: Any, tmp_path: Path) -> None:
    small: dict[str, Any] = {"block_out_channels": (8,), "transformer_layers_per_block": (1,)}
    blocks: dict[str, Any] = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    model = saved(tmp_path / "model", make("sdxl", **small, **blocks).unet)
    code, out, err = said("cost", model, "--size", 16, "--batch", 3, "--no-guidance", "--rounds", 1)
    assert code == 0, err
    assert "3 rows (without guidance) for pictures of 16 x 16" in out
    assert "G g" not in out
    assert "N n" in out
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({}, {}, (2, True, 8, 8)),
        ({"in_channels": 8}, {"size": [16]}, (2, True, 4, 4)),
        ({"time_cond_proj_dim": 6}, {"pictures": 3}, (3, False, 8, 8)),
        ({"sample_size": (8, 12)}, {"guidance": False}, (1, False, 8, 12)),
    ],
)
def test_how_large_a_call_is(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], expected: tuple[int, bool, int, int]
) -> None:
    """LCM's U-Net has one row a picture, whatever is asked."""
    model = saved(tmp_path, make_tiny_unet(**changes), tokens=11)
    found = call_shape(str(model), empty_unet(model), **options)
    assert (found.rows, found.guided, found.height, found.width) == expected
    assert (found.factor, found.tokens) == (4, 11)


def test_a_unet_alone_has_the_usual_factor_and_prompt(tmp_path: Path) -> None:
    model = saved(tmp_path, make_tiny_unet(), vae=False) / "unet"
    found = call_shape(str(model), empty_unet(model))
    assert (found.picture, found.tokens) == ((64, 64), 77)
    unet = empty_unet(saved(tmp_path / "other", make_tiny_unet(sample_size=None), vae=False))
    with pytest.raises(UserError, match="does not say how large its pictures are: give --size"):
        call_shape(str(tmp_path / "other"), unet)


def test_random_weights_are_ordinary_numbers(tmp_path: Path) -> None:
    """Empty memory may hold denormal numbers and NaN, which take longer: outputs must be like a fresh network's."""
    fresh = make("sdxl").unet
    unet = random_unet(empty_unet(saved(tmp_path, fresh)), "cpu", torch.float32)
    assert not any(p.requires_grad for p in unet.parameters())
    for (name, parameter), other in zip(unet.named_parameters(), fresh.parameters(), strict=True):
        assert parameter.isfinite().all(), name
        if other.dim() > 1:
            assert float(parameter.std()) == pytest.approx(float(other.std()), rel=0.5), name
        elif "norm" in name:
            assert float(parameter.mean()) == (1.0 if name.endswith("weight") else 0.0), name


@pytest.mark.parametrize(
    ("words", "said_of"),
    [
        ([], "model"),
        (["nowhere/at-all"], "nowhere/at-all is neither a folder nor a model on the hub"),
        (["empty"], "empty holds no U-Net"),
        (["other"], "unet=UNet2DModel: a cost is that of a UNet2DConditionModel"),
        (["model", "--size", "20"], "--size=20: give height and width in pixels, multiples of 8 (the VAE's 4 x"),
        (["model", "--size", "16", "16", "16"], "--size=16 16 16"),
        (["model", "--size", "-8", "8"], "--size"),
        (["model", "--batch", "0"], "--batch=0"),
        (["model", "--rounds", "0"], "--rounds=0"),
        (["model", "--dtype", "int8"], "--dtype"),
        (["model", "--out", "empty"], "--out empty is a folder"),
    ],
)
def test_mistakes_are_one_line(said: Any, tmp_path: Path, monkeypatch: Any, words: list[str], said_of: str) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("model"), make("sd").unet)
    make("ddpm").unet.save_config("other")
    Path("empty").mkdir()
    code, out, err = said("cost", *words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert said_of in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "model", "other"]


@pytest.mark.parametrize(
    ("text", "said_of"),
    [
        ("{", "is not JSON"),
        ("[1]", "no cost table"),
        ('{"shape": [2, 4]}', "no cost table"),
        ("", "is not JSON"),
    ],
)
def test_other_files_are_no_cost_tables(tmp_path: Path, text: str, said_of: str) -> None:
    file = tmp_path / "cost.json"
    file.write_text(text)
    with pytest.raises(UserError, match=said_of) as error:
        CostTable.load(file)
    assert str(error.value).startswith(str(file))
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read"):
        CostTable.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize("wrong", [{"time": {"1": float("nan")}}, {"time": [1]}, {"guided": "yes"}, {"seconds": "x"}])
def test_values_of_a_cost_table_are_checked(wrong: dict[str, Any]) -> None:
    table = CostTable({"1": 0.2}, {"1": 0.3}, 1.0, 1e9, (2, 4, 8, 8), True, "cpu", "float32", 1)
    assert CostTable.from_json({**table.to_json(), "shares": []}) == table
    with pytest.raises(UserError, match="no cost table"):
        CostTable.from_json({**table.to_json(), **wrong})
