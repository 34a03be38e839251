"""What cheap calls compute, written a second time: all that is seen is kept in dictionaries, on a copy of the U-Net.

It knows nothing of frames, patterns or actors. `Naive` walks block by block through a U-Net whose blocks hand on one
skip tensor a layer; `Hooked` runs a whole U-Net of any family and puts stored branches in afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from helpers import twins
from helpers.families import UNETS
from torch import Tensor

from rwopt.schedule.actions import FULL, Action
from rwopt.unet.actions import Acts, Past
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import BRANCHES, branch_modules, list_sites, resnets_at

RULED = ("transformer", "self", "cross", "ff", "resnet")
"""Site kinds with a branch of their own."""
CALLS = ((9.0, 900), (6.0, 800), (4.0, 700), (2.5, 550), (1.6, 400), (1.0, 250), (0.5, 100))
"""Noise level and timestep of each call of a picture."""


class Naive:
    """Of one picture: called with the number of a call and its rows."""

    def __init__(
        self, unet: Any, rest: Mapping[str, Any], plan: Sequence[Action], weights: Mapping[str, float] | None = None,
        calls: Sequence[tuple[float, float]] = CALLS, guided: bool = True,
    ) -> None:  # fmt: skip
        """rest: the arguments of a call beside sample and timestep; guided: rows are [unconditional, conditional]."""
        self.unet, self.rest, self.plan, self.w = copy.deepcopy(unet), rest, plan, weights or {}
        self.calls, self.guided = calls, guided
        self.sites = list_sites(unet, RULED)
        self.seen: dict[str, list[tuple[float, Any]]] = {}
        self.side = "both"

    def read(self, name: str, order: int, sigma: float) -> Any:
        new_at, new = self.seen[name][-1]
        if not order:
            return new
        old_at, old = self.seen[name][-2]
        share = (math.sqrt(sigma) - math.sqrt(new_at)) / (math.sqrt(new_at) - math.sqrt(old_at))
        if isinstance(new, list):
            return [b + share * (b - a) for a, b in zip(old, new, strict=True)]
        return new + share * (new - old)

    def stored(self, name: str, rule: str, sigma: float) -> Tensor:
        """What a site takes by its rule: of the rows of the call, or the mean of the sides that were computed."""
        if rule == "mean" and self.side != "both":
            both: Tensor = self.read(name, 0, sigma)
            return torch.stack(both.chunk(2)).nanmean(0)
        value: Tensor = halved(self.read(name, rule == "extrapolate", sigma), self.side)
        return value

    def keep(self, name: str, sigma: float, value: Any) -> None:
        """Rows of a side that is not computed are NaN."""
        if self.side != "both":
            none = torch.full_like(value, math.nan)
            value = torch.cat([value, none] if self.side == "uncond" else [none, value])
        self.seen.setdefault(name, []).append((sigma, value))

    def __call__(self, i: int, x: Tensor) -> Tensor:
        action, (sigma, t) = self.plan[i], self.calls[i]
        self.side = action.cfg_branch if self.guided else "both"
        if self.side != "both":
            alone = self.walk(halved(x, self.side), t, halved(self.rest, self.side), action, sigma)
            return torch.cat([alone, alone])
        if action.kind == "output":
            kept: Tensor = self.read("output", action.order, sigma)
            return kept
        if action.kind == "guidance":
            positive = self.walk(x[len(x) // 2 :], t, halved(self.rest), action, sigma)
            return torch.cat([positive - self.read("guidance", action.order, sigma), positive])
        out = self.walk(x, t, self.rest, action, sigma)
        if action.kind == "full":
            self.keep("output", sigma, out)
            if self.guided:
                self.keep("guidance", sigma, out[len(out) // 2 :] - out[: len(out) // 2])
        return out

    def rules(self, action: Action) -> dict[str, str]:
        """Site -> its rule in a call, or run."""
        given = dict(action.sites)
        return {site.id: given.get(site.id, given.get(site.kind, "run")) for site in self.sites}

    def walk(self, x: Tensor, t: float, rest: Mapping[str, Any], action: Action, sigma: float) -> Tensor:
        unet, rules, fresh = self.unet, self.rules(action), action.kind in ("full", "sites")
        emb, text = self.told(x, t, rest)

        def through(path: str, h: Tensor) -> Tensor:
            module, branch_at = unet.get_submodule(path), f"{path}.resnet" if "resnets" in path else path
            rule, w = rules[branch_at], self.w.get(branch_at, 1.0)
            if "resnets" in path:
                return self.resnet(module, branch_at, h, emb, rule, sigma, w, fresh)
            base = h / getattr(module, "rescale_output_factor", 1.0)
            if rule == "skip":
                return base
            if rule != "run":
                return base + w * self.stored(path, rule, sigma)
            if type(module).__name__ == "Attention":
                y = module(h, **{} if text is None else {"encoder_hidden_states": text})
            else:
                with self.branches(module, path, rules, sigma, fresh):
                    y = module(h, encoder_hidden_states=text, return_dict=False)[0]
            if fresh:
                self.keep(path, sigma, y - base)
            return base + w * (y - base)

        h = unet.conv_in(x)
        skips = [h]
        for b, block in enumerate(unet.down_blocks):
            for j in range(len(block.resnets)):
                h = through(f"down_blocks.{b}.resnets.{j}", h)
                if getattr(block, "attentions", None):
                    h = through(f"down_blocks.{b}.attentions.{j}", h)
                skips.append(h)
            for sampler in block.downsamplers or ():
                h = resized(sampler, h, emb)
                skips.append(h)
        if action.kind == "encoder":
            skips = self.read("encoder", action.order, sigma)
            h = skips[-1]
        if action.kind == "full":
            self.keep("encoder", sigma, list(skips))
        h = through("mid_block.resnets.0", h)
        for j in range(len(unet.mid_block.resnets) - 1):
            if unet.mid_block.attentions[j] is not None:
                h = through(f"mid_block.attentions.{j}", h)
            h = through(f"mid_block.resnets.{j + 1}", h)
        left = len(skips)
        for b, block in enumerate(unet.up_blocks):
            for j in range(len(block.resnets)):
                if action.kind == "cut" and left == action.k:
                    h = self.read(f"cut {left}", action.order, sigma)
                if action.kind == "full":
                    self.keep(f"cut {left}", sigma, h)
                left -= 1
                skip = skips[left] * self.w.get(f"up_blocks.{b}.resnets.{j}.skip", 1.0)
                h = through(f"up_blocks.{b}.resnets.{j}", torch.cat([h, skip], 1))
                if getattr(block, "attentions", None):
                    h = through(f"up_blocks.{b}.attentions.{j}", h)
            for sampler in block.upsamplers or ():
                h = resized(sampler, h, emb)
        out: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))
        if unet.config.time_embedding_type == "fourier":
            out = out / t
        return out

    def told(self, x: Tensor, t: Any, rest: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The embedding of the timestep, and the text."""
        unet, text = self.unet, rest.get("encoder_hidden_states")
        times = torch.as_tensor(t).reshape(-1).expand(len(x))
        emb = unet.time_proj(times).to(x.dtype)
        if type(unet).__name__ == "UNet2DModel":
            return unet.time_embedding(emb), None
        emb = unet.time_embedding(emb, rest.get("timestep_cond"))
        added = unet.get_aug_embed(emb, text, rest.get("added_cond_kwargs"))
        emb = emb if added is None else emb + added
        return emb, unet.process_encoder_hidden_states(text, rest.get("added_cond_kwargs"))

    def resnet(
        self, module: Any, name: str, h: Tensor, emb: Tensor, rule: str, sigma: float, w: float, fresh: bool
    ) -> Tensor:
        shortcut = h if module.conv_shortcut is None else module.conv_shortcut(h)
        if rule == "skip":
            return shortcut / module.output_scale_factor
        branch = module(h, emb) * module.output_scale_factor - shortcut if rule == "run" else None
        if branch is None:
            branch = self.stored(name, rule, sigma)
        elif fresh:
            self.keep(name, sigma, branch)
        return (shortcut + w * branch) / module.output_scale_factor

    @contextlib.contextmanager
    def branches(self, module: Any, path: str, rules: Mapping[str, str], sigma: float, fresh: bool) -> Any:
        """Inside of it the branches of a transformer follow their rules."""
        changed = []
        for kind in BRANCHES:
            name = f"{path}.{kind}"
            for i, part in enumerate(branch_modules(module, kind)):
                changed.append(part)
                rule, w = rules[name], self.w.get(name, 1.0)
                part.forward = self.ruled(part, f"{name}.{i}", lambda rule=rule, w=w: (rule, w, sigma, fresh))
        yield
        for part in changed:
            del part.forward

    def ruled(self, part: Any, name: str, now: Callable[[], tuple[str, float, float, bool]]) -> Callable[..., Any]:
        """A forward that keeps, or puts in its place, what comes on top of a module's input (for a transformer) or all
        of it (for a branch). now: rule and weight of the site, noise level, and whether values are fresh."""
        whole = name.rpartition(".")[2] == ""

        def forward(*args: Any, **kwargs: Any) -> Any:
            rule, w, sigma, fresh = now()
            x: Tensor = args[0] if args else kwargs["hidden_states"]
            base = x / getattr(part, "rescale_output_factor", 1.0) if whole else 0.0
            if rule in ("reuse", "extrapolate", "mean"):
                out = base + w * self.stored(name, rule, sigma)
            elif rule == "skip" and whole:
                out = base
            else:
                y = type(part).forward(part, *args, **kwargs)
                y = y if isinstance(y, Tensor) else y[0]
                if rule == "skip":
                    return 0 * y
                if fresh:
                    self.keep(name, sigma, y - base)
                out = base + w * (y - base)
            return (out,) if kwargs.get("return_dict") is False else out

        return forward


class Hooked(Naive):
    """For any family, without cuts and without the encoder. Weights are those of sites with a branch of their own."""

    now: tuple[dict[str, str], float, bool]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for site in self.sites:
            module = self.unet.get_submodule(site.path)
            if site.kind == "resnet":
                parts = [(f"{site.id}.{i}", part.conv2) for i, part in enumerate(resnets_at(module))]
            elif site.kind == "transformer":
                parts = [(f"{site.id}.", module)]
            else:
                parts = [(f"{site.id}.{i}", part) for i, part in enumerate(branch_modules(module, site.kind))]
            for name, part in parts:
                part.forward = self.ruled(part, name, lambda at=site.id: self.rule_of(at))

    def rule_of(self, site: str) -> tuple[str, float, float, bool]:
        rules, sigma, fresh = self.now
        return rules[site], self.w.get(site, 1.0), sigma, fresh

    def walk(self, x: Tensor, t: float, rest: Mapping[str, Any], action: Action, sigma: float) -> Tensor:
        self.now = self.rules(action), sigma, action.kind in ("full", "sites")
        out: Tensor = self.unet(x, t, **rest).sample
        return out


def resized(sampler: Any, h: Tensor, emb: Tensor) -> Tensor:
    """A sampler may be a resnet."""
    out: Tensor = sampler(h, emb) if type(sampler).__name__ == "ResnetBlock2D" else sampler(h)
    return out


def halved(value: Any, side: str = "cond") -> Any:
    """The half of all rows that is a side's, the second of cond; of frames, all of that half of the videos."""
    if isinstance(value, Mapping):
        return {name: halved(inner, side) for name, inner in value.items()}
    if side == "both" or not isinstance(value, Tensor):
        return value
    return value.chunk(2)[side == "cond"]


def picture(call: Any, x: Tensor, calls: Sequence[Any] = CALLS, guided: bool = True, first: int = 0) -> Tensor:
    """A toy sampler, from call `first` on: guided, rows [unconditional, conditional] share their latents."""
    for i in range(first, len(calls)):
        if guided:
            negative, positive = call(i, torch.cat([x, x])).chunk(2)
            x = x - 1.4 / len(calls) * (negative + 4 * (positive - negative))
        else:
            x = x - 1.4 / len(calls) * call(i, x)
    return x


def ours(
    attachment: Attachment, acts: Acts, rest: Mapping[str, Any], weights: Tensor | None,
    calls: Sequence[tuple[float, float]] = CALLS, guided: bool = True,
) -> Callable[[int, Tensor], Tensor]:  # fmt: skip
    """The same call as a `Naive`, by an attachment."""
    past = Past()
    rest = dict(rest)
    text = rest.pop("encoder_hidden_states", None)

    def call(i: int, x: Tensor) -> Tensor:
        nonlocal past
        sigma, t = calls[i]
        past, frame = acts.frame(past, sigma, guided)
        out = attachment.with_frame(frame)(x, t, text, weights, **rest)
        past = acts.after(past, frame, sigma)
        return out

    return call


def sites(rule: str, *names: str, side: str = "both") -> Action:
    return Action("sites", sites=tuple((name, rule) for name in names), cfg_branch=side)


def one_side(*kinds: str) -> list[Action]:
    """Seven calls, some of one side of guidance: means, a value of that side alone, its mean, and lines."""
    first, last = kinds[0], kinds[-1]
    own = Action("sites", sites=((first, "mean"), *(((last, "reuse"),) if last != first else ())), cfg_branch="uncond")
    return [FULL, FULL, sites("mean", first, side="uncond"), own, FULL, sites("extrapolate", *kinds, side="uncond"),
            sites("mean", *kinds, side="cond")]  # fmt: skip


def effective(plan: Sequence[Action], first: int) -> list[Action]:
    """What the calls of an edit do that starts at call `first`: what is not there yet is computed."""
    done, fresh = list(plan), 0
    for i in range(first, len(plan)):
        if fresh < plan[i].takes:
            done[i] = FULL
        fresh += done[i] == FULL
    return done


class Standin:
    """A U-Net's forward that answers by a second implementation, or only notes what it is told."""

    def __init__(self, unet: Any, scheduler: Any, naive: Naive | None = None) -> None:
        self.unet, self.scheduler, self.naive = copy.copy(unet), scheduler, naive
        self.told: list[float] = []
        self.unet.forward = self

    def __call__(self, sample: Tensor, timestep: Any, *args: Any, return_dict: bool = True, **rest: Any) -> Any:
        x, t = sample, timestep
        self.told.append(float(t))
        if self.naive is None:
            side = 2 if type(self.unet).__name__ == "UNetSpatioTemporalConditionModel" else 1
            out = x.narrow(side, 0, 1).repeat_interleave(self.unet.config.out_channels, side)
        else:
            self.naive.rest = rest | ({"encoder_hidden_states": args[0]} if args else {})
            out = self.naive(len(self.told) - 1, x)
        return SimpleNamespace(sample=out) if return_dict else (out,)


def made(name: str) -> twins.Twin:
    """The twin of a family, in double precision, with two rows."""
    if name == "fourier":  # its output is divided by the timestep
        return twins.make("ddpm", time_embedding_type="fourier", block_out_channels=(32, 32)).double()
    if name in twins.NETS:
        return twins.make(name).double()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNETS[name]).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(1)
    rest: dict[str, Any] = {"encoder_hidden_states": torch.randn(2, 5, unet.config.cross_attention_dim, generator=draw)}
    if name == "lcm":
        rest["timestep_cond"] = torch.randn(2, unet.config.time_cond_proj_dim, generator=draw)
    if name == "pruned":
        texts = torch.randn(2, 12, generator=draw)
        rest["added_cond_kwargs"] = {"text_embeds": texts, "time_ids": torch.ones(2, 6)}
    return twins.Twin(unet, torch.randn(2, 4, 8, 8, generator=draw), rest).double()


def calls_of(plan: Sequence[Action]) -> list[tuple[float, float]]:
    """Noise level and timestep of each."""
    sigmas = np.geomspace(9.0, 0.3, len(plan))
    return list(zip(sigmas.tolist(), np.linspace(900, 50, len(plan)).round().tolist(), strict=True))
