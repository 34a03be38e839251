"""How large a U-Net call of a model is, told from its configuration: rows, size of latents, length of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rwopt.errors import UserError, check
from rwopt.models.configuration import empty_vae, prompt_tokens
from rwopt.models.model import latent_size, vae_factor
from rwopt.unet.example import check_plain
from rwopt.unet.sites import list_sites

_FACTOR = 8  # of a VAE that is not there: Stable Diffusion's


@dataclass(frozen=True)
class CallShape:
    """rows: of the batch; guided: whether they are [unconditional, conditional]; height, width: of the latents;
    factor: by which a picture is larger; tokens: of a prompt."""

    rows: int
    guided: bool
    height: int
    width: int
    factor: int
    tokens: int

    @property
    def picture(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height * self.factor, self.width * self.factor


def call_shape(
    name: str, unet: Any, size: Sequence[int] | None = None, pictures: int = 1, guidance: bool = True
) -> CallShape:
    """Of a folder or hub id and its U-Net, which may be without weights.

    size: height and width of pictures in pixels (one number: both); None: what the model was made for. A U-Net that is
    told the guidance scale has one row a picture in any case. Raises `UserError` for U-Nets of other kinds, for a size
    that the VAE and the halvings of the U-Net do not divide, and for `pictures` below 1.
    """
    check_plain(unet, "a cost is that of")
    check(pictures >= 1, "--batch", pictures, "give the number of pictures in a call, 1 or more")
    vae = empty_vae(name)
    factor = _FACTOR if vae is None else vae_factor(vae)
    if size is None and vae is None and unet.config.sample_size is None:
        raise UserError(f"{name} does not say how large its pictures are: give --size HEIGHT WIDTH")
    if size is None:
        size = [factor * n for n in latent_size(unet, vae)]
    halved = max(site.factor for site in list_sites(unet, ("transformer", "resnet")))
    unit = factor * halved
    fits = 1 <= len(size) <= 2 and all(n > 0 and n % unit == 0 for n in size)
    about = f"multiples of {unit} (the VAE's {factor} x the U-Net's {halved})"
    check(fits, "--size", " ".join(map(str, size)), f"give height and width in pixels, {about}")
    guided = guidance and unet.config.time_cond_proj_dim is None
    height, width = size[0] // factor, size[-1] // factor
    return CallShape(pictures * (1 + guided), guided, height, width, factor, prompt_tokens(name))
