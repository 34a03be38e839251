"""What one update of a gradient search takes, estimated on fake tensors for true architectures: no GPU is needed.

`python benchmarks/memory.py [--quick]`, two minutes of one core. Weights on all branches, float16 U-Net, guidance,
one step of the sampler (further ones add their latents only). How far such estimates are from what an H100 counted is
held by `tests/sampling/test_update_memory.py`: 8 % below to 6 % above. Writes `benchmarks/results/memory.json` (rows:
model, checkpointing, vae, pictures, weights, decoder, sampler, peak; bytes) and the table in `docs/tuners.md`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from architectures import SD15, VAE, XL
from comparison import ROOT, publish
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from rwopt.models import Model
from rwopt.sampling.backprop import GradientPath
from rwopt.sampling.memory import update_memory
from rwopt.search.identity import versions
from rwopt.unet.sites import list_sites

MODELS = {"SD1.5, 512 x 512": (SD15, 64, "float16"), "SDXL, 1024 x 1024": (XL, 128, "bfloat16")}
CASES = [(switch, pictures) for switch in ("on", "off") for pictures in (1, 4, 8)]


def model_of(name: str, checkpointing: str) -> Model:
    config, size, vae = MODELS[name]
    with torch.device("meta"):
        unet = torch.nn.Module.to(UNet2DConditionModel(**config, sample_size=size), torch.float16)
        decoder = torch.nn.Module.to(AutoencoderKL(**VAE), getattr(torch, vae))
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    return Model(name, unet, decoder, None, None, scheduler, torch.device("meta"), checkpointing=checkpointing)


def rows(quick: bool) -> list[dict[str, Any]]:
    out = []
    for name in list(MODELS)[: 1 if quick else None]:
        for switch, pictures in CASES[: 1 if quick else None]:
            model = model_of(name, switch)
            sites = [site.id for site in list_sites(model.unet, ("self", "cross", "ff"))]
            found = update_memory(model, sites, pictures, GradientPath("full"))
            about = {"model": name, "checkpointing": switch, "vae": MODELS[name][2], "pictures": pictures}
            out.append({**about, **found._asdict(), "peak": found.peak})
    return out


def markdown(result: dict[str, Any]) -> str:
    """As `docs/tuners.md` shows it."""
    lines = ["| model | `model.checkpointing` | VAE | pictures | weights | decoder | sampler | peak, GiB |"]
    lines.append("|---" * 8 + "|")
    for r in result["rows"]:
        numbers = " | ".join(f"{r[key] / 2**30:.1f}" for key in ("weights", "decoder", "sampler", "peak"))
        lines.append(f"| {r['model']} | {r['checkpointing']} | {r['vae']} | {r['pictures']} | {numbers} |")
    return "\n".join([*lines, "", f"Estimates, not measured on a GPU. `{result['command']}`"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first row only; not kept")
    args = parser.parse_args()
    command = "python benchmarks/memory.py" + (" --quick" if args.quick else "")
    about = {"name": "memory", "command": command, "quick": args.quick, "versions": versions()}
    result = {**about, "rows": rows(args.quick)}
    file = ROOT / "results" / ("memory-quick.json" if args.quick else "memory.json")
    publish(result, markdown(result), file, "tuners.md")


if __name__ == "__main__":
    main()
