"""Number formats: which one a VAE gets, and gradients that float16 would lose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import VAE
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from helpers.small import make_tiny_unet
from torch import Tensor, nn

from rwopt import config
from rwopt.errors import UserError
from rwopt.models import Model, load_model
from rwopt.models.formats import auto_vae_format, in_range
from rwopt.search.identity import fingerprint

FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


def vae_config(**says: bool) -> Any:
    with torch.device("meta"):
        return AutoencoderKL(**VAE, **says).config


@pytest.mark.parametrize(
    ("says", "unet", "bf16", "expected"),
    [
        ({}, HALF, True, HALF),  # Stable Diffusion 1.x: diffusers' default for `force_upcast` is no word of the model
        ({"force_upcast": False}, HALF, False, HALF),
        ({"force_upcast": False}, BRAIN, True, BRAIN),
        ({"force_upcast": True}, HALF, True, BRAIN),  # SDXL
        ({"force_upcast": True}, HALF, False, FULL),
        ({"force_upcast": False}, FULL, True, FULL),
    ],
)
def test_the_vaes_own_number_format_on_a_gpu(
    says: dict[str, bool], unet: torch.dtype, bf16: bool, expected: torch.dtype
) -> None:
    assert auto_vae_format(vae_config(**says), 64, unet, bf16) == expected


def test_a_small_decoder_stays_in_float32(avatars: Model) -> None:
    side = avatars.latent_shape[1]
    assert auto_vae_format(avatars.vae.config, side, BRAIN, True) == FULL
    assert auto_vae_format(FrozenDict(avatars.vae.config), 8 * side, BRAIN, True) == BRAIN


def test_formats_and_switches_are_taken_and_refused(avatars: Model) -> None:
    model = load_model(device="cpu", dtype="float32", vae_dtype="bfloat16", checkpointing="on")
    assert (model.dtype, model.vae.dtype, model.checkpointing) == (FULL, BRAIN, "on")
    z = torch.randn(2, *avatars.latent_shape, generator=torch.Generator().manual_seed(0))
    pictures = model.decode(z)
    assert pictures.dtype == FULL
    torch.testing.assert_close(pictures, avatars.decode(z), rtol=0, atol=0.1)
    assert (avatars.vae.dtype, avatars.checkpointing) == (FULL, "auto")
    with pytest.raises(UserError, match=r"^model.vae_dtype=half is not a number format: use [^\n]* or auto$"):
        load_model("avatars", vae_dtype="half")
    with pytest.raises(UserError, match=r"^model.checkpointing=of: did you mean off\? [^\n]*$"):
        load_model("avatars", checkpointing="of")


def test_a_recipe_says_them_and_checkpointing_makes_no_other_search(avatars: Model) -> None:
    wanted = ("checkpointing=auto", "checkpointing=off", "vae_dtype=float16")
    settings = [config.load("editing", [f"model.{override}"]) for override in wanted]
    assert [s.model.checkpointing for s in settings] == ["auto", "off", "auto"]
    plain, switched, rounded = (fingerprint(s, avatars) for s in settings)
    assert plain == switched != rounded


def test_float16_keeps_small_gradients() -> None:
    """The mean over 256 x 256 pictures has gradients of 5e-6, of which float16 would keep two digits at best."""
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        block_out_channels=(16,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, mid_block_add_attention=False,
    )  # fmt: skip
    vae.eval().requires_grad_(False)
    z = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    for number in (FULL, HALF):
        model = Model("small", None, nn.Module.to(vae, number), None, None, None, torch.device("cpu"))
        found.append(torch.autograd.grad(model.decode(z).square().mean() / 16, z)[0])
    pictures = (vae.decode(z.half() / 0.18215).sample.float() / 2 + 0.5).clamp(0, 1)
    naive = torch.autograd.grad(pictures.square().mean() / 16, z)[0]
    assert alike(found[1], found[0]) > 0.999
    assert alike(naive, found[0]) < 0.99


def alike(a: Tensor, b: Tensor) -> float:
    """Cosine times the smaller ratio of the norms."""
    return float((a * b).sum() / max(a.norm(), b.norm()) ** 2)


@pytest.mark.parametrize("number", [FULL, HALF])
@pytest.mark.parametrize("size", [1.0, 1e-6, 0.0])
def test_gradients_leave_a_network_as_large_as_they_came(number: torch.dtype, size: float) -> None:
    """Inputs that others use too, one without a gradient, and one that is not there."""
    x, w = torch.tensor([0.5, -3.0], requires_grad=True), torch.tensor(2.0, requires_grad=True)
    inside: list[Tensor] = []

    def network(x: Tensor, w: Tensor, fixed: Tensor, missing: None) -> Tensor:
        assert missing is None
        half = (x * w).to(number)
        if half.requires_grad:
            half.register_hook(inside.append)  # type: ignore[no-untyped-call]
        return half.float() + fixed

    out = in_range(network, number, x, w, torch.ones(2), None)
    gx, gw = torch.autograd.grad((out.sum() + x.square().sum()) * size, [x, w])
    torch.testing.assert_close(gx, size * (2 + 2 * x.detach()))
    torch.testing.assert_close(gw, torch.tensor(size * -2.5))
    scaled = number == HALF and size > 0
    assert (1 <= float(inside[0].max()) < 2) if scaled else (inside[0] == size).all()
    with torch.no_grad():
        assert not in_range(network, number, x, w, torch.ones(2), None).requires_grad


def test_a_text_encoder_is_on_the_gpu_for_new_prompts_only() -> None:
    """No GPU is needed: stand-ins note where they are sent."""
    sent: list[str] = []

    class Encoder:
        def to(self, device: Any) -> None:
            sent.append(str(device))

    def encode_prompt(prompts: list[str], **_: Any) -> Any:
        sent.append("called")
        return torch.zeros(len(prompts), 3, 4), None

    def encode(model: Model, *prompts: str) -> list[str]:
        sent.clear()
        assert model.encode(list(prompts)).shape == (len(prompts), 3, 4)
        return list(sent)

    pipe = SimpleNamespace(text_encoder=Encoder(), encode_prompt=encode_prompt)
    parts = (make_tiny_unet(), None, None, None, None)
    gpu, cpu = (Model("m", *parts, torch.device(place), pipe=pipe) for place in ("cuda", "cpu"))
    assert encode(gpu, "a", "b") == ["cuda", "called", "cpu"]
    assert encode(gpu, "b", "a") == []
    assert encode(gpu, "b", "c") == ["cuda", "called", "cpu"]
    assert encode(cpu, "a") == ["called"]
