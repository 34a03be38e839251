"""Gradient ascent of a reward on the weight function's theta, as a Lightning loop. Imported only where it is used.

The module's state is theta, Adam's moments and a count of updates;
what an update sees is a function of (seed, count) alone, so a run that is killed and resumed gives the same bits.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from rwopt.sampling.backprop import GradientPath, keeps_activations, unroll
from rwopt.schedule.weights import hat
from rwopt.tuners.options import GradientOptions
from rwopt.tuners.problem import Problem
from rwopt.unet.attachment import Attachment


class Ascent(L.LightningModule):
    """theta [d] stays float32 whatever the U-Net's format; frozen networks are no sub-modules, so checkpoints are tiny.

    low, high: bounds of theta, to which every update is projected.
    """

    theta: Tensor
    start: Tensor
    low: Tensor
    high: Tensor
    count: Tensor
    calls: Tensor
    mean: Tensor

    def __init__(
        self,
        problem: Problem,
        attachment: Attachment | None,
        start: np.ndarray,
        bounds: tuple[np.ndarray, np.ndarray],
        options: GradientOptions,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.problem, self.attachment, self.options, self.seed = problem, attachment, options, seed
        self.kept = False
        self.path = GradientPath(options.mode, options.last, options.stride)
        self.theta = nn.Parameter(torch.tensor(start, dtype=torch.float32))
        for name, value in (("start", start), ("low", bounds[0]), ("high", bounds[1])):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))  # updates so far
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))  # U-Net calls x pictures so far
        self.register_buffer("mean", torch.tensor(start, dtype=torch.float64))  # of theta, what is scored

    def slices(self, update: int) -> list[slice]:
        """The pictures of one update, in micro-batches: every pass over the cases has its own order."""
        size, pictures = self.options.batch, self.problem.pictures
        blocks = [slice(i, min(i + size, pictures)) for i in range(0, pictures, size)]
        out = []
        for j in range(update * self.options.accumulate, (update + 1) * self.options.accumulate):
            turn, place = divmod(j, len(blocks))
            out.append(blocks[np.random.default_rng([self.seed, turn]).permutation(len(blocks))[place]])
        return out

    def reward_gradient(self, rows: slice, update: int) -> tuple[Tensor, Tensor]:
        """(sum of rewards, its gradient [d]) of one micro-batch."""
        problem, function = self.problem, self.problem.function
        assert self.attachment is not None
        theta = self.theta.double() if function.steps is not None else self.theta  # levels are differences of near ones
        x, cond, course, reward = problem.batch(self.attachment, rows, theta)
        table, knots = function.table(theta).to(self.theta.dtype), function.knots(course.sigmas)

        def weights(sigma: float) -> Tensor:  # as a schedule's: linear between knots in ln sigma
            row = torch.as_tensor(hat(knots, sigma), dtype=table.dtype, device=table.device) @ table
            assert isinstance(row, Tensor)
            return row

        self.kept = keeps_activations(problem.model, self.attachment, x, cond, len(course))
        actions = function.actions_at(course.sigmas)
        end = unroll(problem.model, self.attachment, x, cond, course, weights, self.path, update, actions)
        total = reward(end).sum()
        return total.detach(), torch.autograd.grad(total, self.theta)[0]

    def training_step(self, batch: Any, index: int) -> None:
        """One update. Gradients are summed and reduced by hand: several backward passes, one exchange of d numbers."""
        update, o = int(self.count), self.options
        share = self.slices(update)[self.global_rank :: self.trainer.world_size]
        packed = torch.zeros(len(self.theta) + 3, dtype=torch.float64)  # gradient, reward, pictures, price
        for rows in share:
            reward, gradient = self.reward_gradient(rows, update)
            pictures = rows.stop - rows.start
            price = self.path.price(self.problem.steps, update, self.kept) * pictures
            packed += torch.cat([gradient.double().cpu(), torch.tensor([float(reward), pictures, price]).double()])
        packed = self.trainer.strategy.reduce(packed, reduce_op="sum")
        gradient, (reward, pictures, price) = packed[:-3].to(self.theta), packed[-3:].tolist()
        gradient = -gradient / pictures + 2 * o.pull * (self.theta.detach() - self.start)
        norm = gradient.norm()
        finite = bool(torch.isfinite(norm))
        self.theta.grad = gradient if finite else torch.zeros_like(gradient)  # one bad picture must not end a run
        optimizer: Any = self.optimizers()
        self.clip_gradients(optimizer, gradient_clip_val=o.clip, gradient_clip_algorithm="norm")
        optimizer.step()
        with torch.no_grad():
            self.theta.copy_(self.theta.clamp(self.low, self.high))
        self.count += 1
        kept = o.average * (1 - o.average ** (int(self.count) - 1)) / (1 - o.average ** int(self.count))
        self.mean = kept * self.mean + (1 - kept) * self.theta.detach().double()  # the start has no share in it
        self.calls += int(price)
        self.log_dict({"update": float(self.count), "reward": reward / pictures, "norm": norm if finite else 0.0,
                       "calls": float(self.calls)})  # fmt: skip

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.theta], lr=self.options.rate, betas=(0.8, 0.95))


class Keep(Callback):
    """The state after each update, renamed into place: a kill leaves the old file or the new one."""

    def __init__(self, path: Path, log: Callable[[dict[str, float]], None] | None) -> None:
        self.path, self.report = path, log

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        temporary = self.path.with_name(f".{self.path.name}.new")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, self.path)
            if self.report is not None:
                self.report({k: float(v) for k, v in trainer.callback_metrics.items()})


def ascend(
    module: Ascent, updates: int, folder: Path, devices: int = 1, log: Callable[[dict[str, float]], None] | None = None
) -> None:
    """Bring the run in `folder` to `updates` updates, from `last.ckpt` if there is one; the result is in that file.

    devices > 1: cases are shared out over processes (DDP). On CPU they are forked; on GPUs start the program under
    torchrun or srun, which Lightning recognises. Every segment has its own CSV in `csv/<first update>/metrics.csv`.
    """
    last = folder / "last.ckpt"
    done = 0 if not last.exists() else read(last)["count"]
    if done >= updates:
        return
    cpu = module.problem.model.device.type == "cpu"
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu" if cpu else "gpu", devices=devices,
            strategy="auto" if devices == 1 else "ddp_fork" if cpu and "LOCAL_RANK" not in os.environ else "ddp",
            max_steps=updates, max_epochs=-1, precision="32-true", log_every_n_steps=1, use_distributed_sampler=False,
            logger=CSVLogger(folder, "csv", f"{done:06d}", flush_logs_every_n_steps=1), callbacks=[Keep(last, log)],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, range(10**9), ckpt_path=last if done else None)  # the data are only turns to take


def read(path: Path) -> dict[str, Any]:
    """Mean of theta [d] float64, count and calls of a checkpoint."""
    state = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]  # our own file
    return {"theta": state["mean"].numpy(), "count": int(state["count"]), "calls": int(state["calls"])}
