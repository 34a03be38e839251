"""Text to what a U-Net takes of it, by the stock pipeline's own `encode_prompt`.

So whatever that has does what it does there: textual inversions, left-out layers (on the positive side alone), the two
encoders of Stable Diffusion XL and its zeros in the place of a negative prompt that is not given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwopt.models.quiet import quiet

BATCH = 64  # prompts that go through the encoders at once


class Text(NamedTuple):
    """N prompts, float32. tokens: embeddings [N, L, D]; pooled: one vector a prompt [N, P] (SDXL), or None."""

    tokens: Tensor
    pooled: Tensor | None = None


def encoders_of(pipe: Any) -> list[Any]:
    """A pipeline's text encoders that are there: one, or SDXL's two."""
    found = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
    return [encoder for encoder in found if encoder is not None]


@dataclass
class Texts:
    """The text side of a pipeline. Each prompt is encoded once; on a GPU the encoders are there for new ones only, and
    lie in the computer's own memory otherwise.

    clip_skip: layers at the end of the encoders that are left out, as diffusers counts them (0: none).
    """

    pipe: Any
    device: torch.device
    clip_skip: int = 0
    _known: dict[tuple[str, bool], tuple[Tensor, Tensor | None]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.clip_skip:
            for encoder in self.encoders:
                give_text_model(encoder)

    @property
    def encoders(self) -> list[Any]:
        """`encoders_of` its pipeline."""
        return encoders_of(self.pipe)

    def positive(self, prompts: Sequence[str]) -> Text:
        """Of N prompts."""
        return self._of(prompts, negative=False)

    def negative(self, prompts: Sequence[str]) -> Text:
        """Of N negative prompts; "" stands for one that is not given."""
        return self._of(prompts, negative=True)

    def _of(self, prompts: Sequence[str], negative: bool) -> Text:
        new = [p for p in dict.fromkeys(prompts) if (p, negative) not in self._known]
        away = bool(new) and self.device.type == "cuda"
        if away:
            for encoder in self.encoders:
                encoder.to(self.device)
        size = 1 if negative else BATCH  # not given is not the same as empty: SDXL has zeros for it
        for i in range(0, len(new), size):
            part = new[i : i + size]
            tokens, pooled = self._encoded(part, negative)
            for k, prompt in enumerate(part):
                self._known[prompt, negative] = tokens[k], None if pooled is None else pooled[k]
        if away:
            for encoder in self.encoders:
                encoder.to("cpu")
        found = [self._known[p, negative] for p in prompts]
        vectors = [own for _, own in found if own is not None]
        return Text(torch.stack([own for own, _ in found]), torch.stack(vectors) if vectors else None)

    @torch.no_grad()
    def _encoded(self, prompts: list[str], negative: bool) -> tuple[Tensor, Tensor | None]:
        given: dict[str, Any] = {"clip_skip": self.clip_skip or None}
        if negative:
            given["negative_prompt"] = None if prompts == [""] else prompts
        with quiet():  # what of a prompt is cut off, `Model.lost_words` says
            found = self.pipe.encode_prompt(
                [""] * len(prompts) if negative else prompts, device=self.device, num_images_per_prompt=1,
                do_classifier_free_guidance=negative, **given,
            )  # fmt: skip
        tokens, pooled = found[1 if negative else 0], None
        if len(found) == 4:
            pooled = found[3 if negative else 2].float()
        return tokens.float(), pooled

    def lost_words(self, prompt: str) -> str:
        """The end of a prompt that lies beyond the windows of all encoders and does nothing; "" if all of it counts."""
        lost = ""
        with quiet():
            for name in ("tokenizer", "tokenizer_2"):
                tokenizer = getattr(self.pipe, name, None)
                if tokenizer is None:
                    continue
                window = tokenizer.model_max_length
                ids = tokenizer(self._converted(prompt, tokenizer), truncation=False, verbose=False).input_ids
                if len(ids) <= window:
                    return ""
                own: str = tokenizer.decode(ids[window - 1 : -1]).strip()
                lost = min(lost or own, own, key=len)
        return lost

    def _converted(self, prompt: str, tokenizer: Any) -> str:
        """With the further tokens of textual inversions that have several."""
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        return prompt if convert is None else convert(prompt, tokenizer)


def give_text_model(encoder: Any) -> None:
    """Let diffusers find the last norm of a text encoder when it leaves out layers.

    It looks in `text_model`, which `CLIPTextModel` has no longer as from transformers 5.6. Not as a module of its own:
    the encoder would be its own child.
    """
    if not hasattr(encoder, "text_model"):
        vars(encoder)["text_model"] = encoder


def pipe_of_parts(vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> Any:
    """A Stable Diffusion pipeline of parts that came without one."""
    from diffusers import StableDiffusionPipeline

    with quiet():
        return StableDiffusionPipeline(
            vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        )
