"""What a weighed U-Net computes, written a second time: every block layer by layer, no hook, no block's own forward.

Called as they are: layers (norms, convolutions, projections, attention inside of a transformer block), embeddings, and
the parts that no weight touches (resizers, the time axis of video models).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.utils.torch_utils import apply_freeu
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Weights = Mapping[str, Any]
"""Site -> weight, a number or one a row of the call ([B])."""


def recompute(unet: Any, x: Tensor, t: Any, weights: Weights, mode: str = "residual", **rest: Any) -> Tensor:
    """The U-Net's output; `rest`: the other arguments of its call."""
    return _Call(unet, weights, mode)(x, t, **rest)


def oracle_of(unet: Any, weights: Callable[[Any], Weights], mode: str = "residual") -> Any:
    """A stand-in that a pipeline can use, with the same layers; `weights` is given the call's timestep."""
    net = copy.copy(unet)

    def forward(sample: Tensor, timestep: Any, *args: Any, return_dict: bool = True, **rest: Any) -> Any:
        if args:
            rest["encoder_hidden_states"] = args[0]
        out = recompute(unet, sample, timestep, weights(timestep), mode, **rest)
        return SimpleNamespace(sample=out) if return_dict else (out,)

    net.forward = forward
    return net


class _Call:
    def __init__(self, unet: Any, weights: Weights, mode: str) -> None:
        self.unet, self.weights, self.mode = unet, weights, mode
        self.frames, self.emb, self.text, self.flags = 1, torch.empty(0), None, {}

    def __call__(
        self,
        x: Tensor,
        t: Any,
        encoder_hidden_states: Any = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Any = None,
        added_time_ids: Tensor | None = None,
        cross_attention_kwargs: Any = None,
        down_block_additional_residuals: Any = None,
        mid_block_additional_residual: Any = None,
    ) -> Tensor:
        unet, video, shape = self.unet, x.ndim == 5, x.shape
        frames_second = added_time_ids is not None and video
        times = torch.as_tensor(t).reshape(-1).expand(len(x))
        projected = unet.time_proj(times).to(x.dtype)
        emb = unet.time_embedding(projected, *([] if timestep_cond is None else [timestep_cond]))
        text = encoder_hidden_states
        if type(unet).__name__ == "UNet2DConditionModel":
            more = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added_cond_kwargs)
            emb = emb if more is None else emb + more
            emb = emb if unet.time_embed_act is None else unet.time_embed_act(emb)
            text = unet.process_encoder_hidden_states(text, added_cond_kwargs)
        if added_time_ids is not None:
            ids = unet.add_time_proj(added_time_ids.flatten()).reshape(len(x), -1)
            emb = emb + unet.add_embedding(ids.to(emb.dtype))
        if video:
            self.frames = x.shape[1] if frames_second else x.shape[2]
            x = x.flatten(0, 1) if frames_second else x.transpose(1, 2).flatten(0, 1)
            emb = emb.repeat_interleave(self.frames, 0)
            if type(unet).__name__ != "UNetMotionModel":  # whose pipelines do it
                text = text.repeat_interleave(self.frames, 0)
        self.emb, self.text = emb, text
        self.flags = {"cross_attention_kwargs": cross_attention_kwargs}

        picture = x  # what the Skip blocks of score-based models carry along
        x = unet.conv_in(x)
        if hasattr(unet, "transformer_in"):
            x = unet.transformer_in(x, num_frames=self.frames).sample
        skips = [x]
        for i, block in enumerate(unet.down_blocks):
            x, picture = self.down(f"down_blocks.{i}", block, x, skips, picture)
        for i, extra in enumerate(down_block_additional_residuals or ()):
            skips[i] = skips[i] + extra
        x = self.middle(unet.mid_block, x)
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual
        picture = None
        for i, block in enumerate(unet.up_blocks):
            mine = [skips.pop() for _ in block.resnets]
            x, picture = self.up(f"up_blocks.{i}", block, x, mine, picture)
        if unet.conv_norm_out is not None:
            x = unet.conv_act(unet.conv_norm_out(x))
        x = unet.conv_out(x)
        if picture is not None:
            x = x + picture
        if video:
            x = x.unflatten(0, (shape[0], self.frames))
            x = x if frames_second else x.transpose(1, 2)
        return x

    # --------------------------------------------------------------------------------------------- weights

    def w(self, name: str, like: Tensor) -> Tensor:
        value = torch.as_tensor(self.weights.get(name, 1.0), dtype=like.dtype)
        if value.ndim:
            value = value.repeat_interleave(len(like) // len(value)).reshape(-1, *[1] * (like.ndim - 1))
        return value

    def joined(self, name: str, x: Tensor, branch: Tensor, divisor: float = 1.0) -> Tensor:
        """Stream and branch of a site."""
        w = self.w(name, x)
        return (w * (x + branch) if self.mode == "output" else x + w * branch) / divisor

    # --------------------------------------------------------------------------------------------- blocks

    def down(self, path: str, block: Any, x: Tensor, skips: list[Any], picture: Any) -> tuple[Tensor, Any]:
        attentions = getattr(block, "attentions", None)
        for j in range(len(block.resnets)):
            x = self.resnet(f"{path}.resnets.{j}", x)
            x = self.timed(block, "temp_convs", j, x)
            if attentions is not None:
                x = self.attention(f"{path}.attentions.{j}", x)
            x = self.timed(block, "motion_modules", j, self.timed(block, "temp_attentions", j, x))
            last = type(block).__name__ == "KCrossAttnDownBlock2D" and block.downsamplers is None
            skips.append(None if last else x)
        if hasattr(block, "skip_conv"):
            if block.downsamplers is not None:
                x = block.resnet_down(x, self.emb)
                picture = block.downsamplers[0](picture)
                x = block.skip_conv(picture) + x
                skips.append(x)
        elif block.downsamplers is not None:
            x = self.resized(block.downsamplers[0], x)
            if not type(block).__name__.startswith("K"):
                skips.append(x)
        return x, picture

    def middle(self, block: Any, x: Tensor) -> Tensor:
        if block is None:
            return x
        x = self.timed(block, "temp_convs", 0, self.resnet("mid_block.resnets.0", x))
        for j in range(len(block.resnets) - 1):
            if block.attentions[j] is not None:
                x = self.attention(f"mid_block.attentions.{j}", x)
            x = self.timed(block, "motion_modules", j, self.timed(block, "temp_attentions", j, x))
            x = self.timed(block, "temp_convs", j + 1, self.resnet(f"mid_block.resnets.{j + 1}", x))
        return x

    def up(self, path: str, block: Any, x: Tensor, skips: list[Any], picture: Any) -> tuple[Tensor, Any]:
        """`skips`: the next one first."""
        attentions = getattr(block, "attentions", None)
        if type(block).__name__.startswith("K"):
            skips = skips[:1] + [None] * (len(block.resnets) - 1)
        freeu = {name: getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")}
        for j, skip in enumerate(skips):
            if all(freeu.values()):
                x, skip = apply_freeu(block.resolution_idx, x.clone(), skip, **freeu)
            if skip is not None:
                x = torch.cat([x, self.w(f"{path}.resnets.{j}.skip", skip) * skip], 1)
            x = self.resnet(f"{path}.resnets.{j}", x)
            x = self.timed(block, "temp_convs", j, x)
            if attentions is not None and len(attentions) == len(block.resnets):
                x = self.attention(f"{path}.attentions.{j}", x)
            x = self.timed(block, "motion_modules", j, self.timed(block, "temp_attentions", j, x))
        if hasattr(block, "skip_norm"):
            if attentions is not None:  # one, behind all resnets
                x = self.attention(f"{path}.attentions.0", x)
            picture = 0 if picture is None else block.upsampler(picture)
            if block.resnet_up is not None:
                picture = picture + block.skip_conv(block.act(block.skip_norm(x)))
                x = block.resnet_up(x, self.emb)
        elif block.upsamplers is not None:
            x = self.resized(block.upsamplers[0], x)
        return x, picture

    def resized(self, module: Any, x: Tensor) -> Tensor:
        return module(x, self.emb) if type(module).__name__ == "ResnetBlock2D" else module(x)

    def timed(self, block: Any, family: str, index: int, x: Tensor) -> Tensor:
        """A module of the time axis, if the block has that family."""
        modules = getattr(block, family, None)
        if modules is None:
            return x
        y = modules[index](x, num_frames=self.frames)
        return y if isinstance(y, Tensor) else y[0]

    # --------------------------------------------------------------------------------------------- resnets

    def resnet(self, path: str, x: Tensor) -> Tensor:
        m, name = self.unet.get_submodule(path), f"{path}.resnet"
        if not hasattr(m, "spatial_res_block"):
            shortcut, branch = self.convolved(m, x)
            return self.joined(name, shortcut, branch, m.output_scale_factor)
        # With frames: two residual branches one after the other; mode output weighs what leaves both.
        w = self.w(name, x) if self.mode == "residual" else 1.0
        shortcut, branch = self.convolved(m.spatial_res_block, x)
        spatial = (shortcut + w * branch).unflatten(0, (-1, self.frames)).transpose(1, 2)
        part = m.temporal_res_block
        h = part.conv1(part.nonlinearity(part.norm1(spatial)))
        emb = part.time_emb_proj(part.nonlinearity(self.emb)).unflatten(0, (-1, self.frames))
        h = part.conv2(part.nonlinearity(part.norm2(h + emb.transpose(1, 2)[..., None, None])))
        shortcut = spatial if part.conv_shortcut is None else part.conv_shortcut(spatial)
        w = self.w(name, spatial) if self.mode == "residual" else 1.0
        y = self.blended(m.time_mixer, spatial, shortcut + w * h).transpose(1, 2).flatten(0, 1)
        return y if self.mode == "residual" else self.w(name, y) * y

    def convolved(self, m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shortcut and branch."""
        if type(m).__name__ == "ResnetBlockCondNorm2D":
            h = m.conv1(m.nonlinearity(m.norm1(x, self.emb)))
            h = m.norm2(h, self.emb)
        else:
            emb = m.time_emb_proj(self.emb if m.skip_time_act else m.nonlinearity(self.emb))[:, :, None, None]
            h = m.conv1(m.nonlinearity(m.norm1(x)))
            if m.time_embedding_norm == "scale_shift":
                scale, shift = emb.chunk(2, 1)
                h = m.norm2(h) * (1 + scale) + shift
            else:
                h = m.norm2(h + emb)
        h = m.conv2(m.nonlinearity(h))
        return (x if m.conv_shortcut is None else m.conv_shortcut(x)), h

    def blended(self, mixer: Any, spatial: Tensor, temporal: Tensor) -> Tensor:
        """No row is a lone picture."""
        alpha = torch.sigmoid(mixer.mix_factor).to(spatial.dtype)
        if mixer.switch_spatial_to_temporal_mix:
            alpha = 1 - alpha
        return alpha * spatial + (1 - alpha) * temporal

    # --------------------------------------------------------------------------------------------- attention

    def attention(self, path: str, x: Tensor) -> Tensor:
        m = self.unet.get_submodule(path)
        kind = type(m).__name__
        if kind == "Attention":
            return self.lone(path, m, x)
        if kind == "KAttentionBlock":
            return self.joined(path, x, self.k_block(path, m, x) - x)
        return self.joined(path, x, self.transformer(path, m, x))

    def lone(self, path: str, m: Any, x: Tensor) -> Tensor:
        """Self-attention of pixels; with text (DeepFloyd IF, Kandinsky) its keys and values come first."""
        tokens = m.group_norm(x.flatten(2)).transpose(1, 2)
        q, k, v = m.to_q(tokens), None, None
        if not getattr(m, "only_cross_attention", False):
            k, v = m.to_k(tokens), m.to_v(tokens)
        if getattr(m, "add_k_proj", None) is not None:
            text = m.norm_encoder_hidden_states(self.text) if m.norm_cross else self.text
            more = (m.add_k_proj(text), m.add_v_proj(text))
            k, v = more if k is None else (torch.cat([more[0], k], 1), torch.cat([more[1], v], 1))
        q, k, v = (part.unflatten(-1, (m.heads, -1)).transpose(1, 2) for part in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, scale=m.scale).transpose(1, 2).flatten(2)
        return self.joined(path, x, m.to_out[0](out).transpose(1, 2).reshape(x.shape), m.rescale_output_factor)

    def k_block(self, path: str, m: Any, x: Tensor) -> Tensor:
        for kind, attention, norm in (("self", "attn1", "norm1"), ("cross", "attn2", "norm2")):
            if not hasattr(m, attention):
                continue
            tokens = getattr(m, norm)(x, self.emb).flatten(2).transpose(1, 2)
            text = self.text if kind == "cross" else None
            out = getattr(m, attention)(tokens, encoder_hidden_states=text)
            x = x + self.w(f"{path}.{kind}", x) * out.transpose(1, 2).reshape(x.shape)
        return x

    def transformer(self, path: str, m: Any, x: Tensor) -> Tensor:
        """The branch of a transformer, spatial or spatial and temporal."""
        height, width = x.shape[2:]
        linear = type(m.proj_in).__name__ == "Linear" or getattr(m, "use_linear_projection", False)
        h = m.norm(x)
        h = m.proj_in(h.flatten(2).transpose(1, 2)) if linear else m.proj_in(h).flatten(2).transpose(1, 2)
        temporal = getattr(m, "temporal_transformer_blocks", [None] * len(m.transformer_blocks))
        for block, later in zip(m.transformer_blocks, temporal, strict=True):
            more = {} if later is not None else self.flags["cross_attention_kwargs"] or {}
            h = h + self.w(f"{path}.self", h) * block.attn1(block.norm1(h), **more)
            h = h + self.w(f"{path}.cross", h) * block.attn2(block.norm2(h), encoder_hidden_states=self.text, **more)
            h = h + self.w(f"{path}.ff", h) * block.ff(block.norm3(h))
            if later is not None:
                order = torch.arange(self.frames).repeat(len(x) // self.frames)
                place = m.time_pos_embed(m.time_proj(order).to(h.dtype))[:, None]
                first = self.text[:: self.frames]  # its text is that of the first frame, for every pixel
                context = first.repeat_interleave(height * width, 0)
                mixed = later(h + place, num_frames=self.frames, encoder_hidden_states=context)
                h = self.blended(m.time_mixer, h, mixed)
        if linear:
            return m.proj_out(h).transpose(1, 2).reshape(x.shape)
        return m.proj_out(h.transpose(1, 2).unflatten(2, (height, width)))
