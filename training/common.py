"""What every training shares: the drawn pools, the Lightning trainer (EMA, checkpoints, resume, CSV), safe export."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

ROOT = Path(__file__).resolve().parent
CACHE, RUNS = ROOT / "cache", ROOT / "runs"
MODEL = ROOT.parent / "rwopt" / "models" / "avatars"


def load_pool(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [N, 2, 64, 64, 3] and attribute values int8 [N, 2, 10] of one pool of `draw.py`."""
    path = CACHE / f"pool_{name}.npz"
    if not path.exists():
        raise SystemExit(f"{path.name} is missing: run `python training/draw.py` first")
    with np.load(path) as stored:
        return stored["pictures"], stored["values"]


def to_float(pictures: np.ndarray) -> Tensor:
    """uint8 [N, 64, 64, 3] to float [N, 3, 64, 64] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


def visible(values: np.ndarray) -> np.ndarray:
    """Attribute values [..., 10] as labels: -1 where the picture does not show the attribute (see `world.labels`)."""
    from world import NAMES

    order = list(NAMES)
    out = values.astype(np.int64)
    bald = (values[..., order.index("hair")] == 0) & (values[..., order.index("facial_hair")] == 0)
    out[..., order.index("hair_color")][bald] = -1
    out[..., order.index("eyes")][values[..., order.index("glasses")] == 2] = -1
    return out


class Batches(IterableDataset[Any]):
    """Endless batches, each a function of (seed, step) and the process, so that a resumed run sees what it would have
    seen."""

    def __init__(self, make: Callable[[np.random.Generator], Any], seed: int, steps: int, start: int = 0) -> None:
        self.make, self.seed, self.steps, self.start = make, seed, steps, start

    def __iter__(self) -> Iterator[Any]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        for step in range(self.start, self.steps):
            yield self.make(np.random.default_rng([self.seed, step, rank]))  # 0: that of [seed, step]


def fit(
    module: L.LightningModule,
    make: Callable[[np.random.Generator], Any],
    name: str,
    steps: int,
    seed: int,
    ema: float = 0.999,
    processes: int = 1,
) -> L.LightningModule | None:
    """Train `module` for `steps` batches; goes on from `training/runs/<name>/last.ckpt` where there is one.

    processes: so many, each with batches of its own and the mean of their gradients. On two cores, where a second
    thread gains nothing, two processes with half a batch each take 0.78 of the time.

    Returns the module with its averaged weights, in the first process alone.
    """
    L.seed_everything(seed, verbose=False)
    folder = RUNS / name
    last = folder / "last.ckpt"
    start = int(torch.load(last, weights_only=False)["global_step"]) if last.exists() else 0
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=CSVLogger(folder, name="log", version="all"),
        callbacks=[
            EMAWeightAveraging(decay=ema),
            ModelCheckpoint(folder, filename="state", save_last=True, save_top_k=1, every_n_train_steps=250,
                            enable_version_counter=False),
            TQDMProgressBar(refresh_rate=20),
        ],
        gradient_clip_val=1.0,
        log_every_n_steps=25,
        enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(Batches(make, seed, steps, start), batch_size=None)
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None)
    return module if trainer.is_global_zero else None


def publish(save: Callable[[Path], None], name: str, model: Path = MODEL) -> Path:
    """Write one component of an embedded model whole or not at all."""
    target = model / name
    temporary = model / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save(temporary)
    for path in temporary.glob("*.json"):  # diffusers notes the folder that a model came from: a path of one machine
        text = path.read_text()
        if '"_name_or_path"' in text:
            path.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "_name_or_path"}, indent=2))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    return target


def publish_pipeline(pipe: Any, model: Path = MODEL) -> None:
    """Put a pipeline's U-Net, text encoder, tokenizer and scheduler beside the VAE, in the standard layout."""
    from transformers import CLIPTextConfig

    pipe.save_config(model)
    for name in ("unet", "text_encoder", "tokenizer", "scheduler"):
        part = getattr(pipe, name)
        publish(lambda path, part=part: part.save_pretrained(path), name, model)
    # transformers 5 loads by what the configuration says; diffusers loads the other parts in float32
    CLIPTextConfig.from_pretrained(model / "text_encoder", dtype="float32").save_pretrained(model / "text_encoder")
