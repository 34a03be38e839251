"""What the input of a U-Net holds beside the latents, told from its number of channels, and which edits that is for."""

from __future__ import annotations

from rwopt.errors import UserError

EXTRA: dict[str, tuple[int, ...]] = {
    "generation": (0,), "sdedit": (0,), "inversion": (0,), "instruct": (4,), "inpaint": (5, 0),
}  # fmt: skip
"""Channels beside the latents by what is done: the source's latents (4; Brooks et al., 2023, arXiv 2211.09800), or the
mask and the latents of what it leaves (5; Rombach et al., 2022, arXiv 2112.10752). Any plain model can inpaint, too."""

_KINDS = {0: "text to picture", 4: "InstructPix2Pix", 5: "inpainting", 1: "depth-to-picture"}
_FOR = {0: "task.method=sdedit, inversion or inpaint", 4: "task.method=instruct", 5: "task.method=inpaint"}


def check_channels(name: str, channels: int, latents: int, method: str = "") -> None:
    """Raise `UserError` for a U-Net whose input of `channels` is none for what is done (a key of `EXTRA`; "": any)."""
    extra = channels - latents
    kind = _KINDS.get(extra, "another kind")
    has = f"model.name={name} has a U-Net of {channels} channels for latents of {latents} ({kind})"
    if extra not in _FOR:
        raise UserError(f"{has}: such models are not searched, rwopt.apply takes them")
    if method and extra not in EXTRA[method]:
        what = "task.name=generation" if method == "generation" else f"task.method={method}"
        wanted = " or ".join(str(latents + n) for n in EXTRA[method])
        raise UserError(f"{has}, and {what} takes one of {wanted}: use task.name=editing with {_FOR[extra]}")
