"""Small-channel twins of the models that people have, seeded and random, as diffusers folders; one as a single file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwopt.embedded import FOLDERS

FAMILIES = ("sd1", "sd2", "sdxl", "lcm", "pruned")
NOISE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
WIDTH, SECOND = 16, 24  # of the text encoder, and of SDXL's second
POOLED = 12  # of its pooled text

SD: dict[str, Any] = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "cross_attention_dim": WIDTH, "attention_head_dim": 2,
}  # fmt: skip
XL: dict[str, Any] = SD | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": WIDTH + SECOND, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + POOLED,
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "sd1": SD,
    "sd2": SD | {"use_linear_projection": True},
    "sdxl": XL,
    "lcm": SD | {"time_cond_proj_dim": 9},  # odd: padded
    "pruned": XL  # as SSD-1B: no attention in the middle, other depths on the way up
    | {
        "mid_block_type": "UNetMidBlock2D",
        "reverse_transformer_layers_per_block": ((2, 1), 1),
    },
}


def save_family(name: str, folder: Path, variant: str | None = None) -> Path:
    """A folder that stock diffusers opens: pictures of 64 x 64, the embedded model's tokenizer, DDIM (LCM for lcm)."""
    import diffusers
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(FAMILIES.index(name))
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS["avatars"] / "tokenizer")
    prediction = "v_prediction" if name == "sd2" else "epsilon"
    if name == "lcm":
        scheduler = diffusers.LCMScheduler(**NOISE)
    else:
        scheduler = diffusers.DDIMScheduler(
            **NOISE, steps_offset=1, clip_sample=False, timestep_spacing="trailing", prediction_type=prediction
        )

    def text(width: int) -> Any:
        return CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length, projection_dim=POOLED,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip

    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, sample_size=64,
    )  # fmt: skip
    parts = {
        "vae": vae, "text_encoder": CLIPTextModel(text(WIDTH)), "tokenizer": tokenizer, "scheduler": scheduler,
        "unet": diffusers.UNet2DConditionModel(**UNETS[name]),
    }  # fmt: skip
    _spread(parts["text_encoder"])
    if name in ("sdxl", "pruned"):
        second = CLIPTextModelWithProjection(text(SECOND))
        _spread(second)
        pipe: Any = diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False
        )
    else:
        kind = diffusers.LatentConsistencyModelPipeline if name == "lcm" else diffusers.StableDiffusionPipeline
        pipe = kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder, variant=variant)
    return folder


def _spread(encoder: torch.nn.Module) -> None:
    """Fresh text encoders say nearly the same of all prompts: their weights are small."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "norm" not in name:
                parameter.mul_(4)


def save_lora(name: str, folder: Path) -> Path:
    """A LoRA with effect for U-Net and text encoders of a family's twin."""
    from diffusers import DiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = DiffusionPipeline.from_pretrained(save_family(name, folder / "base"))
    torch.manual_seed(1)
    layers: dict[str, Any] = {}
    for part, targets in (("unet", ["to_q", "to_v"]), ("text_encoder", ["q_proj"]), ("text_encoder_2", ["q_proj"])):
        net = getattr(pipe, part, None)
        if net is None:
            continue
        net.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights="gaussian"))
        for key, parameter in net.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.5)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(net)
    pipe.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


# --- the single file


def save_single_file(folder: Path, path: Path, *flags: str) -> Path:
    """The twin of Stable Diffusion 1 or XL as one file with LDM's names. flags: empty tensors."""
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file

    pipe = DiffusionPipeline.from_pretrained(folder)
    xl = hasattr(pipe, "text_encoder_2")
    tensors: dict[str, Tensor] = {flag: torch.empty(0) for flag in flags}
    blocks = len(pipe.unet.config.block_out_channels)
    for key, value in pipe.unet.state_dict().items():
        tensors["model.diffusion_model." + _unet_name(key, pipe.unet.config.layers_per_block, blocks)] = value
    for key, value in pipe.vae.state_dict().items():
        attention = ".attentions." in key and key.endswith("weight") and value.ndim == 2
        own = value[:, :, None, None] if attention else value  # convolutions there
        tensors["first_stage_model." + _vae_name(key, len(pipe.vae.config.block_out_channels))] = own
    first = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    for key, value in pipe.text_encoder.state_dict().items():
        tensors[first + "text_model." + key.removeprefix("text_model.")] = value
    if xl:
        second = _open_clip(pipe.text_encoder_2.state_dict())
        tensors |= {"conditioner.embedders.1.model." + key: value for key, value in second.items()}
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
    return path


_OPEN_CLIP = {"embeddings.token_embedding.weight": "token_embedding.weight",
              "embeddings.position_embedding.weight": "positional_embedding", "final_layer_norm": "ln_final",
              "encoder.layers": "transformer.resblocks", "self_attn.out_proj": "attn.out_proj",
              "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}  # fmt: skip


def _open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder with OpenCLIP's names: queries, keys and values are one matrix, the projection is on its
    side."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("text_model.")
        for ours, theirs in _OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        if ".q_proj." in name:
            parts = [state[key.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            out[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
        elif name == "text_projection.weight":
            out["text_projection"] = value.T
        elif ".k_proj." not in name and ".v_proj." not in name:
            out[name] = value
    return out


_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
           "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
_TOP = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip


def _unet_name(key: str, layers: int, blocks: int) -> str:
    for name, ldm in _TOP.items():
        if key.startswith(name + "."):
            return key.replace(name, ldm)
    match = re.fullmatch(r"(down|up|mid)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)", key)
    assert match is not None, key
    side, part, rest = match[1], match[3], match[5]
    block, j = int(match[2] or 0), int(match[4])
    if part == "resnets":
        first, _, last = rest.partition(".")
        rest = f"{_RESNET[first]}.{last}"
    if side == "mid":
        return f"middle_block.{2 * j if part == 'resnets' else 1}.{rest}"
    start = (layers + 1) * block + (1 if side == "down" else 0)
    place = "input_blocks" if side == "down" else "output_blocks"
    if part == "downsamplers":
        return f"{place}.{start + layers}.0.{rest.replace('conv', 'op')}"
    if part == "upsamplers":
        return f"{place}.{start + layers}.2.{rest}"
    return f"{place}.{start + j}.{0 if part == 'resnets' else 1}.{rest}"


_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _vae_name(key: str, levels: int) -> str:
    if ".attentions." in key:
        for name, ldm in _ATTENTION.items():
            key = key.replace(f"attentions.0.{name}.", f"attn_1.{ldm}.")
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key).replace("mid_block", "mid")
    key = re.sub(r"down_blocks\.(\d+)", r"down.\1", key)
    key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", key)
    return key.replace(".resnets.", ".block.").replace("samplers.0", "sample")
