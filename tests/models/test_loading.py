"""Loading: what is refused and how it is named, variants, files of every kind, other VAEs, textual inversions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from helpers.families import SD, UNETS, save_family, save_lora, save_single_file
from safetensors.torch import save_file

from rwopt.errors import UserError
from rwopt.models import Model, load_model, loading
from rwopt.models.variants import only_variant


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("sd1", tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("sdxl", tmp_path_factory.mktemp("sdxl"))


def load(place: Path | str, **options: Any) -> Model:
    return load_model(str(place), "cpu", "float32", **options)


def refused(place: Path | str, said: str, **options: Any) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load(place, **options)
    assert "\n" not in str(caught.value)


def copy_of(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place))


# --- switches, folders, ids


@pytest.mark.parametrize("dtype", ["float8", "half", ""])
def test_unknown_number_formats_are_refused(dtype: str) -> None:
    with pytest.raises(UserError, match=rf"^model.dtype={dtype} is not a number format[^\n]*$"):
        load_model("avatars", dtype=dtype)


def test_unknown_models_and_devices_are_refused(tmp_path: Path) -> None:
    for name in (str(tmp_path), "./nothing"):  # no folder of a pipeline; no possible hub id, hence no network
        refused(name, r"^model.name=[^\n]* cannot be opened [^\n]*$")
    with pytest.raises(UserError, match=r"^model.device=toaster[^\n]*$"):
        load_model("avatars", device="toaster")


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (object(), "scheduler object without alphas_cumprod"),
        (SimpleNamespace(alphas_cumprod=[], config={"prediction_type": "sample"}), "has prediction_type=sample"),
    ],
)
def test_noise_that_is_no_diffusions_is_refused(monkeypatch: pytest.MonkeyPatch, scheduler: Any, said: str) -> None:
    monkeypatch.setattr(loading, "_open", lambda *_: SimpleNamespace(scheduler=scheduler))
    refused("avatars", said)


@pytest.mark.parametrize(
    "kind",
    [
        "StableDiffusion3Pipeline", "FluxPipeline", "IFPipeline", "KandinskyV22Pipeline", "PixArtAlphaPipeline",
        "StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline",
        "StableDiffusionControlNetXSPipeline", "PixArtSigmaPipeline", "StableCascadeCombinedPipeline", "KolorsPipeline",
        "StableVideoDiffusionPipeline",
        "HunyuanDiTPipeline", "AuraFlowPipeline", "StableDiffusionUpscalePipeline", "AnimateDiffPipeline",
    ],
)  # fmt: skip
def test_pipelines_of_another_kind_are_named_before_their_weights_are_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind, "unet": ["diffusers", "Unknown"]}))
    refused(tmp_path, f"^model.name=.* is a {kind}: search, sample and edit take ")


def test_a_refiner_and_another_unet_are_named(tmp_path: Path) -> None:
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    refused(tmp_path, "is an SDXL refiner")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNetMotionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    refused(tmp_path, "has a UNetMotionModel")


@pytest.mark.parametrize(
    ("channels", "method", "said"),
    [
        (5, "", r"a U-Net of 5 channels for latents of 4 \(depth.*\): such models"), (7, "", "another kind"),
        (9, "sdedit", r"9 channels .*\(inpainting\), and task.method=sdedit takes one of 4: use .*task.method=inpaint"),
        (8, "generation", r"\(InstructPix2Pix\), and task.name=generation .*task.method=instruct"),
        (8, "inpaint", "takes one of 9 or 4"), (4, "instruct", "takes one of 8"),
    ],
)  # fmt: skip
def test_a_unet_of_other_inputs_is_named_before_its_weights_are_read(
    sd: Path, tmp_path: Path, channels: int, method: str, said: str
) -> None:
    folder = copy_of(sd, tmp_path / "model")
    UNet2DConditionModel(**SD, in_channels=channels).save_config(folder / "unet")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    refused(folder, said, method=method)


@pytest.mark.parametrize(
    ("kind", "channels", "method"),
    [("StableDiffusionInpaintPipeline", 9, "inpaint"), ("StableDiffusionInstructPix2PixPipeline", 8, "instruct"),
     ("StableDiffusionXLInpaintPipeline", 9, "inpaint"), ("StableDiffusionXLInstructPix2PixPipeline", 8, "instruct")],
)  # fmt: skip
def test_models_made_for_edits_are_opened(
    sd: Path, xl: Path, tmp_path: Path, kind: str, channels: int, method: str
) -> None:
    family, config = (xl, UNETS["sdxl"]) if "XL" in kind else (sd, SD)
    folder = copy_of(family, tmp_path / "model")
    UNet2DConditionModel(**config, in_channels=channels).save_pretrained(folder / "unet")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
    model = load(folder, method=method)
    assert model.latent_shape == (4, 8, 8)
    assert model.extra_channels == channels - 4
    assert model.family == ("sdxl" if "XL" in kind else "sd")


def test_cosxl_is_named(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionXLInstructPix2PixPipeline", "is_cosxl_edit": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    refused(tmp_path, "is a CosXL edit model")


def test_an_index_without_a_class_is_told_by_its_encoders(xl: Path, tmp_path: Path) -> None:
    folder = copy_of(xl, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionXLImg2ImgPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    assert type(load(folder).pipe).__name__ == "StableDiffusionXLPipeline"
    index["_class_name"] = "DiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load(folder).encode(["a"]).shape[-1] == 16 + 24


# --- variants


def test_a_folder_of_one_variant_needs_no_name_for_it(tmp_path: Path, sd: Path) -> None:
    folder = save_family("sd1", tmp_path / "fp16", variant="fp16")
    assert only_variant(sd) == ""
    assert only_variant(folder) == "fp16"
    for options in ({}, {"variant": "fp16"}):
        got = load(folder, **options)
        assert all(torch.equal(a, b) for a, b in zip(got.unet.parameters(), load(sd).unet.parameters(), strict=True))
    refused(sd, "cannot be opened .*variant", variant="fp16")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"unet": ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"]}, ""),
        ({"unet": ["diffusion_pytorch_model.bin"], "vae": ["diffusion_pytorch_model.fp16.bin"]}, "fp16"),
        ({"unet": ["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"]}, "fp16"),
        ({"unet": ["diffusion_pytorch_model-00001-of-00002.safetensors"]}, ""),
        ({"text_encoder": ["model.ema.safetensors", "model.fp16.safetensors"]}, "fp16"),
        ({"text_encoder": ["model.ema.safetensors"]}, "ema"),
        ({"unet": ["config.json"]}, ""),
    ],
)
def test_which_variant_a_folder_has_alone(tmp_path: Path, files: dict[str, list[str]], expected: str) -> None:
    for part, names in files.items():
        (tmp_path / part).mkdir()
        for name in names:
            (tmp_path / part / name).touch()
    assert only_variant(tmp_path) == expected


def test_a_hub_id_of_the_half_precision_variant_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network: a stand-in that has fp16 and nothing else. What is told of an absent model is the first error."""
    asked: list[str | None] = []

    def from_pretrained(place: str, variant: str | None = None, **_: Any) -> str:
        asked.append(variant)
        if variant != "fp16" or place == "some/thing":
            raise OSError(f"no {variant}")
        return "pipe"

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", from_pretrained)
    given = loading.SD, torch.float32, "", "", None
    assert loading._open("some/half", *given) == "pipe"
    assert asked == [None, "fp16"]
    with pytest.raises(OSError, match="no None"):
        loading._open("some/thing", *given)


# --- files

CONV = torch.zeros(8, 4, 3, 3)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_down_blocks_0.lora_down.weight": CONV}, "is a LoRA: give it as model.loras"),
        ({"unet.down_blocks.0.attentions.0.lora_A.weight": CONV}, "is a LoRA"),
        ({"emb_params": torch.zeros(2, 8)}, "is a textual inversion: give it as model.embeddings"),
        ({"control_model.input_blocks.0.0.weight": CONV}, "is a ControlNet"),
        ({"model.diffusion_model.joint_blocks.0.x": CONV}, "is a Stable Diffusion 3: single files are taken of"),
        ({"text_encoders.clip_l.transformer.text_model.x": CONV, "model.diffusion_model.joint_blocks.0.x": CONV},
         "is a Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.qkv.weight": CONV}, "is a Flux"),
        ({"down_blocks.0.resnets.0.conv1.weight": CONV}, "is one part of a diffusers folder"),
        ({"input_blocks.0.0.weight": CONV}, "is a U-Net alone"),
        ({"encoder.conv_in.weight": CONV, "decoder.conv_in.weight": CONV}, "is a VAE: give it as model.vae"),
        ({"something": CONV}, r"holds tensors of another kind \(something"),
        ({}, "holds tensors of another kind"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 5, 3, 3),
          "model.diffusion_model.out.2.weight": torch.zeros(4, 8, 3, 3)}, "5 channels for latents of 4"),
        ({"model.diffusion_model.input_blocks.0.0.weight": CONV,
          "conditioner.embedders.0.model.ln_final.bias": CONV}, "is an SDXL refiner"),
        ({"model.diffusion_model.input_blocks.0.0.weight": CONV}, "holds no VAE: give model.vae"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_model_says_what_it_is(tmp_path: Path, tensors: dict[str, Any], said: str) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "file.safetensors")
    refused(tmp_path / "file.safetensors", said)


def test_other_files_are_refused(tmp_path: Path, sd: Path) -> None:
    refused(tmp_path / "absent.safetensors", "is not there: check the path")
    (tmp_path / "old.ckpt").write_bytes(b"x")
    refused(tmp_path / "old.ckpt", "is a pickle, which may run anything")
    (tmp_path / "text.safetensors").write_text("hello")
    refused(tmp_path / "text.safetensors", r"is no .safetensors file \(")
    path = save_single_file(sd, tmp_path / "mine.safetensors")
    refused(path, "give model.config", config=str(tmp_path))


# --- add-ons


def test_another_vae(sd: Path, tmp_path: Path) -> None:
    """A VAE's own folder, a pipeline's, a small autoencoder, a file; shifted latents."""
    torch.manual_seed(1)
    config = AutoencoderKL.load_config(sd / "vae")
    other = AutoencoderKL.from_config(config, scaling_factor=0.5, shift_factor=0.25)
    other.save_pretrained(tmp_path / "vae")
    model = load(sd, vae=str(tmp_path / "vae"))
    pictures = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = other.eval().encode(pictures * 2 - 1).latent_dist.mean
        back = other.decode(raw).sample
    torch.testing.assert_close(model.latents(pictures), (raw - 0.25) * 0.5)
    torch.testing.assert_close(model.decode((raw - 0.25) * 0.5), (back / 2 + 0.5).clamp(0, 1))
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).save_pretrained(tmp_path / "tiny")  # fmt: skip
    model = load(sd, vae=str(tmp_path / "tiny"))
    assert model.factor == 8
    assert model.latents(pictures).shape == (1, *model.latent_shape)
    assert model.decode(model.latents(pictures)).shape == pictures.shape
    own = load(sd)
    whole = load(sd, vae=str(sd))
    assert torch.equal(whole.decode(whole.latents(pictures)), own.decode(own.latents(pictures)))
    filed = load(sd, vae=str(save_single_file(sd, tmp_path / "vae.safetensors")))
    assert torch.equal(filed.latents(pictures), own.latents(pictures))
    refused(sd, "^model.vae=.* cannot be opened", vae="./nothing")
    refused(sd, "^model.vae=.* is not there", vae=str(tmp_path / "absent.safetensors"))


def test_a_vae_with_means_and_spreads_of_its_own(sd: Path) -> None:
    model = load(sd)
    raw = model.latents(torch.zeros(1, 3, 64, 64)) / model.vae.config.scaling_factor
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 4.0]
    before = model.decode(raw * model.vae.config.scaling_factor)
    model.vae.register_to_config(latents_mean=mean, latents_std=std)
    shift, spread = (torch.tensor(v).view(1, 4, 1, 1) for v in (mean, std))
    scaled = (raw - shift) * model.vae.config.scaling_factor / spread
    torch.testing.assert_close(model.latents(torch.zeros(1, 3, 64, 64)), scaled)
    torch.testing.assert_close(model.decode(scaled), before)


def test_textual_inversions(sd: Path, xl: Path, tmp_path: Path) -> None:
    """Words of one or several vectors, in the file's own word or named after it; two encoders."""
    draw = torch.Generator().manual_seed(0)
    save_file({"<cat>": torch.randn(1, 16, generator=draw)}, tmp_path / "cat.safetensors")
    save_file({"emb_params": torch.randn(2, 16, generator=draw)}, tmp_path / "qdog.safetensors")
    files = [str(tmp_path / "cat.safetensors"), str(tmp_path / "qdog.safetensors")]
    model, plain = load(sd, embeddings=files), load(sd)
    stock = DiffusionPipeline.from_pretrained(sd)
    stock.load_textual_inversion(files[0])
    expected, _ = stock.encode_prompt("portrait, <cat>", "cpu", 1, False)
    torch.testing.assert_close(model.encode(["portrait, <cat>"]), expected)
    assert torch.equal(model.encode(["portrait"]), plain.encode(["portrait"]))
    assert not torch.allclose(model.encode(["portrait, qdog"]), plain.encode(["portrait, qdog"]))
    assert model.lost_words("qdog, " * 11) != "" == plain.lost_words("portrait, " * 11)  # two tokens are one word
    save_file(
        {"clip_l": torch.randn(1, 16, generator=draw), "clip_g": torch.randn(1, 24, generator=draw)},
        tmp_path / "qfox.safetensors",
    )
    both = load(xl, embeddings=[str(tmp_path / "qfox.safetensors")]).encode(["portrait, qfox"])
    changed = (both - load(xl).encode(["portrait, qfox"])).abs()
    assert changed[..., :16].max() > 1e-3
    assert changed[..., 16:].max() > 1e-3
    refused(xl, "cannot be added .it has no clip_l", embeddings=files[:1])
    refused(sd, r"^model.embeddings=.*absent.* is not there", embeddings=[str(tmp_path / "absent.safetensors")])


def test_loras_that_do_not_fit_are_refused(sd: Path, xl: Path, tmp_path: Path) -> None:
    path = str(save_lora("sdxl", tmp_path))
    refused(sd, r"^model.loras.* cannot be added .its layers have other sizes.: give a LoRA for", loras={path: 1.0})
    save_file({"unknown.lora_A.weight": CONV}, tmp_path / "none.safetensors")
    refused(sd, r"^model.loras", loras={str(tmp_path / "none.safetensors"): 1.0})
    refused(xl, r"^model.loras.*give its scale", loras={path: "much"})
    refused(sd, r"^model.loras.* cannot be added", loras={str(tmp_path / "absent.safetensors"): 1.0})


def test_left_out_layers_are_counted(sd: Path, xl: Path) -> None:
    for place, most in ((sd, 3), (xl, 2)):
        assert load(place, clip_skip=most).encode(["portrait"]).isfinite().all()
        for wrong in (most + 1, -1):
            refused(place, rf"^model.clip_skip={wrong}: .* 0 to {most}$", clip_skip=wrong)


def test_parts_are_read_in_their_own_formats(xl: Path) -> None:
    model = load_model(str(xl), "cpu", "bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.vae.dtype == model.pipe.text_encoder.dtype == model.pipe.text_encoder_2.dtype == torch.float32
    assert not any(p.requires_grad for part in model.texts.encoders for p in part.parameters())
    assert model.lost_words("portrait, " * 40) != ""
    assert model.lost_words("portrait") == ""
