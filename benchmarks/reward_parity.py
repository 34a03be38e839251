"""Reward networks of rwopt against the packages that they come from, on the same random weights: rewards and gradients.

    python benchmarks/reward_parity.py [image_reward] [hps] [lpips]

Needs an environment of its own, beside rwopt: `image-reward==1.5 transformers==4.55.4 diffusers==0.35.2
huggingface_hub==0.36.2 datasets==3.6.0 clip-anytorch setuptools<81` for `image_reward` (the true size: 8 GB of memory
and 2 GB of disk for some minutes), `open_clip_torch` for `hps`, torchmetrics for `lpips`; all import torchvision. Exits
with 1 if scores differ by more than 1e-5 of their size.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwopt.objectives import Batch
from rwopt.objectives import hps as hps_reward
from rwopt.objectives import image_reward as reward
from rwopt.objectives import lpips as perceptual
from rwopt.objectives.preprocess import CLIP_MEAN, CLIP_STD, normalise

TOLERANCE = 1e-5
PROMPTS = ["a red fox in the snow, oil painting", "two cups of coffee on a table"]


def torchvision_on_any_machine() -> None:
    """Import torchvision even where its compiled operators do not load, such as a GPU build on a machine without one:
    nothing here needs them."""
    original = torch.library.register_fake

    def register_fake(op: Any, *args: Any, **kwargs: Any) -> Any:
        if str(op).startswith("torchvision::"):
            return lambda function: function
        return original(op, *args, **kwargs)

    torch.library.register_fake = register_fake
    import torchvision  # noqa: F401

    torch.library.register_fake = original


def pictures(seed: int, side: int) -> Tensor:
    """Smooth random pictures [2, 3, side, side]."""
    coarse = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)


def outcome(score: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and their gradient to the pictures."""
    images = images.clone().requires_grad_()
    scores = score(images)
    return scores.detach(), torch.autograd.grad(scores.sum(), images)[0]


def compare(name: str, ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], images: Tensor) -> bool:
    """Print both and whether they agree."""
    (a, da), (b, db) = outcome(ours, images), outcome(theirs, images)
    scores = float((a - b).abs().max() / b.abs().max())
    slopes = float((da - db).norm() / db.norm())
    good = scores <= TOLERANCE and slopes <= 10 * TOLERANCE
    print(f"{name}: rwopt {[f'{x:.8f}' for x in a.tolist()]} package {[f'{x:.8f}' for x in b.tolist()]}")
    print(f"    relative difference: scores {scores:.1e}, gradient {slopes:.1e} (norm {float(db.norm()):.6e}): {good}")
    return good


def image_reward() -> bool:
    """Both backends of `image_reward` on one random checkpoint of the true size, with the package's own names."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reward.write_wordpieces(folder)
        torch.save(reward.random_state(1024, 768, (24, 12), side=224, patch=16, words=30524), folder / "ImageReward.pt")
        options = {"checkpoint": str(folder / "ImageReward.pt"), "tokenizer": name}
        both = [reward.make(reward.NAME, **options, backend=backend) for backend in reward.BACKENDS]
        assert [isinstance(o.function, reward.ImageReward) for o in both] == [True, False]
    ours, theirs = ((lambda x, o=objective: o(Batch(x, prompts=PROMPTS))) for objective in both)
    return compare("image_reward", ours, theirs, pictures(1, 256))


def hps() -> bool:
    """`hps.v2` against open_clip's network of the same architecture, two layers deep."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    options = hps_reward.tiny(hps_reward.NAME)
    objective = hps_reward.make(hps_reward.NAME, **options)
    vision = CLIPVisionCfg(layers=2, width=80, head_width=80, patch_size=8, image_size=32)
    theirs = CLIP(48, vision, CLIPTextCfg(width=64, heads=1, layers=2, vocab_size=514), output_dict=True).eval()
    theirs.load_state_dict(torch.load(options["checkpoint"], weights_only=True)["state_dict"])

    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(options["tokenizer"])
    tokens = words(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    ends = tokens.eq(513).long().argmax(1, keepdim=True)
    tokens = tokens.where(torch.arange(77) <= ends, 0)  # open_clip fills up with zeros

    def package(images: Tensor) -> Tensor:
        out = theirs(normalise(images, CLIP_MEAN, CLIP_STD), tokens)
        return (out["image_features"] * out["text_features"]).sum(1)

    return compare("hps.v2", lambda x: objective(Batch(x, prompts=PROMPTS)), package, pictures(2, 32))


def lpips() -> bool:
    """`lpips.*` against torchmetrics' `_LPIPS`, on torchvision's own networks and state dicts."""
    import torchvision
    from torchmetrics.functional.image import lpips as metric

    good, other = True, pictures(4, 96)
    models = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
    for name in perceptual.specs():
        network = getattr(torchvision.models, models[name.split(".")[1]])().eval()
        metric._get_tv_model_features = lambda *_, network=network: network.features
        theirs = metric._LPIPS(net=name.split(".")[1]).eval()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "backbone.pth"
            torch.save(network.state_dict(), path)
            objective = perceptual.make(name, backbone=str(path), sha256="any")

        def ours(images: Tensor, objective: Any = objective) -> Tensor:
            return objective(Batch(images, reference=other))

        def package(images: Tensor, theirs: Any = theirs) -> Tensor:
            return theirs(images, other, normalize=True).reshape(-1)

        good = compare(name, ours, package, pictures(3, 96)) and good
    return good


if __name__ == "__main__":
    torchvision_on_any_machine()
    parts = {"image_reward": image_reward, "hps": hps, "lpips": lpips}
    sys.exit(0 if all([parts[name]() for name in sys.argv[1:] or parts]) else 1)
