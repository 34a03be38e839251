"""Signal-to-noise ratio: does scaling a branch up help the signal or the noise of the stream it joins?

For `h = r + w a` with signal parts s and noise parts n (s = s_r + s_a, n = n_r + n_a),

    d log SNR / dw at 1  =  2 <s, s_a> / |s|^2  -  2 <n, n_a> / |n|^2 ,   SNR = |s|^2 / |n|^2 ,

so w > 1 raises the SNR of h exactly where the branch holds more than its share of signal. Signal and noise are
defined by repetition: one clean picture z is noised to the level of a step with M independent noises, x_m =
sqrt(abar) z + sqrt(1 - abar) eps_m; the part of h that all share, E h, is its signal, h_m - E h its noise. Inner
products are estimated without bias from M draws: <s, s_a> as the mean of <h_m, a_m'> over m != m', <n, n_a> as the
sample covariance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes import Importance, mean_interval
from rwopt.probes.teacher import Teacher
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition, predict
from rwopt.sampling.sample import sample
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import Site, branch_modules, find_sites

Watched = dict[tuple[int, int], tuple[Tensor, Tensor]]  # (site, block in it) -> (stream after the branch h, branch a)


@dataclass(frozen=True)
class Snr:
    """Score: mean over pictures of the derivative above at each site, the positive text alone (no guidance).

    The clean pictures are the plain run's own, made with its guidance: N + N M calls for M draws, N of them guided.
    A branch site with several transformer blocks gets the mean of theirs.
    details: "snr" [K, S], mean over pictures of the SNR of h in nepers (natural log). There is no student's
    trajectory here: a state of the sampler has no second noise for the same picture.
    """

    draws: int = 8
    seed: int = 0
    mode: ClassVar[str] = "residual"

    def __post_init__(self) -> None:
        if self.draws < 2:
            raise UserError(f"probe.draws={self.draws} must be at least 2: noise is what differs between draws")

    @torch.no_grad()
    def __call__(
        self, model: Model, attachment: Attachment, x: Tensor, cond: Condition, course: Course
    ) -> Importance:
        if attachment.mode == "output":
            raise UserError("probe snr in output mode: scaling all of a stream keeps its SNR, use mode=residual")
        sites, calls = find_sites(model.unet, attachment.sites), model.calls
        sigmas = Teacher(model, attachment, x, cond, course).sigmas
        clean, text = sample(model, attachment, x, cond, course), cond.unguided()
        generator = torch.Generator().manual_seed(self.seed)
        slopes: list[Any] = []
        levels: list[Any] = []
        for i, told in enumerate(course.told):
            moments: dict[tuple[int, int], Moments] = {}
            for _ in range(self.draws):
                noise = torch.randn(x.shape, generator=generator).to(x)
                with watch(model.unet, sites) as seen:
                    predict(model, attachment, course.noised(i, clean, noise), told, text)
                for key, (stream, branch) in seen.items():
                    moments.setdefault(key, Moments()).add(stream, branch)
            for out, read in ((slopes, Moments.slope), (levels, Moments.log_snr)):
                blocks = [[read(m) for (s, _), m in moments.items() if s == site] for site in range(len(sites))]
                out.append([np.mean(b, axis=0) for b in blocks])
        mean, low, high = mean_interval(np.array(slopes), signed=True)
        about = {**asdict(self), "mode": attachment.mode, "pictures": len(x)}
        about["snr"] = np.array(levels).mean(2).tolist()
        return Importance(attachment.sites, sigmas, mean, low, high, model.calls - calls, "snr", about)


class Moments:
    """Running sums over draws of h and a, [N, ...], from which the inner products follow."""

    def __init__(self) -> None:
        self.draws = 0
        self.sums: list[Any] = [0.0, 0.0, 0.0, 0.0]  # h, a [N, D]; <h, h>, <h, a> [N]

    def add(self, stream: Tensor, branch: Tensor) -> None:
        h, a = stream.double().flatten(1), branch.double().flatten(1)
        self.draws += 1
        for k, term in enumerate((h, a, (h * h).sum(1), (h * a).sum(1))):
            self.sums[k] = self.sums[k] + term

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """|s|^2, <s, s_a>, |n|^2, <n, n_a>, each [N]."""
        m, (h, a, hh, ha) = self.draws, self.sums
        across, with_branch = (h * h).sum(1), (h * a).sum(1)
        pairs = m * (m - 1)
        signal = (across - hh) / pairs, (with_branch - ha) / pairs
        return *signal, (hh - across / m) / (m - 1), (ha - with_branch / m) / (m - 1)

    def slope(self) -> np.ndarray:
        """d log SNR / dw at w = 1 of each picture [N]."""
        ss, sa, nn, na = self.parts()
        return np.asarray((2 * sa / ss.clamp(min=1e-30) - 2 * na / nn.clamp(min=1e-30)).cpu().numpy())

    def log_snr(self) -> np.ndarray:
        """log SNR of each picture [N]."""
        ss, _, nn, _ = self.parts()
        return np.asarray((ss.clamp(min=1e-30) / nn.clamp(min=1e-30)).log().cpu().numpy())


@contextmanager
def watch(unet: Any, sites: list[Site]) -> Iterator[Watched]:
    """Fill in, during the U-Net calls inside, what stream and branch were at each site.

    A transformer's branch is what it adds to its input. Inside a `BasicTransformerBlock` the stream is followed from
    the block's input by adding its branches in turn: self, cross, feed-forward.
    """
    seen: Watched = {}
    handles = []

    def transformer_hook(s: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            stream = out[0] if isinstance(out, tuple) else out.sample
            seen[s, 0] = stream, stream - (args[0] if args else kwargs["hidden_states"])

        return hook

    def follow(block: Any, columns: dict[Any, tuple[int, int]]) -> None:
        state: dict[str, Tensor] = {}

        def enter(module: Any, args: Any, kwargs: Any) -> None:
            state["stream"] = args[0] if args else kwargs["hidden_states"]

        def branch(module: Any, args: Any, out: Tensor) -> None:
            state["stream"] = state["stream"] + out
            if module in columns:
                seen[columns[module]] = state["stream"], out

        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        for name in ("attn1", "attn2", "ff"):
            if getattr(block, name, None) is not None:
                handles.append(getattr(block, name).register_forward_hook(branch))

    wanted: dict[str, dict[Any, tuple[int, int]]] = {}
    for s, site in enumerate(sites):
        module = unet.get_submodule(site.path)
        if site.kind == "transformer":
            handles.append(module.register_forward_hook(transformer_hook(s), with_kwargs=True))
        else:
            parts = branch_modules(module, site.kind)
            wanted.setdefault(site.path, {}).update({part: (s, b) for b, part in enumerate(parts)})
    for path, columns in wanted.items():
        for block in unet.get_submodule(path).transformer_blocks:
            follow(block, columns)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
