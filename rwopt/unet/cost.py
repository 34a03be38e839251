"""What each action costs on this machine: shares of a full U-Net call, by operations and by measured time.

Operations mislead where weights and not arithmetic are read, and where norms and copies count, so a plan is priced by
time at the size and batch in use. Time is that of this thread's processor (on a GPU the device's), each action against
a full call right beside it; medians of the ratios withstand what else a machine does. Prices are in full-call
equivalents.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from rwopt.errors import UserError, one_line
from rwopt.files import read_head
from rwopt.schedule.actions import FULL, Action, Actions, Level
from rwopt.unet.actions import Frame, Past
from rwopt.unet.actions_patterns import Layout
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_LARGEST = 2**20  # bytes of a file
SITE_KINDS = ("transformer", "self", "cross", "ff", "resnet")


@dataclass(frozen=True)
class CostTable:
    """Costs of actions over that of a full call, by `Action.letter` of order 0 (order 1 costs the same within noise).

    operations: by multiply-adds; time: by measured time; seconds: of a full call; multiply_adds: of a full call;
    shape: of the sample, rows first; guided: whether its rows are [unconditional, conditional]; device, dtype, threads:
    where it was measured.
    """

    operations: Mapping[str, float]
    time: Mapping[str, float]
    seconds: float
    multiply_adds: float
    shape: tuple[int, ...]
    guided: bool
    device: str
    dtype: str
    threads: int
    sites: Mapping[str, float] = field(default_factory=dict)
    """share of measured time that leaving a site kind's branches out saves"""

    def of(self, action: Action) -> float:
        """Cost of a call. UserError if it was not measured. A rule for several site kinds costs 1 less their shares; of
        one side of guidance, times the cost of a call on guidance, which has as many rows."""
        if action == FULL:
            return 1.0
        if action.kind == "output":
            return 0.0
        key = _key(action)
        if key in self.time:
            return self.time[key]
        if action.kind == "sites" and all(name in self.sites for name, _ in action.sites):
            rows = self.of(Action("guidance")) if action.paired and self.guided else 1.0
            return rows * (1.0 - sum(self.sites[name] for name, _ in action.sites))
        raise UserError(f"the cost of action {key} was not measured: measure it with cost_table(actions=...)")

    def price(self, plan: Actions | Iterable[Action]) -> float:
        """Of all calls of a plan (one call a level), in full-call equivalents."""
        actions = [level.action for level in plan.levels] if isinstance(plan, Actions) else plan
        return sum(map(self.of, actions))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostTable:
        """Of a file that `rwopt cost --out` wrote, or a run folder's. UserError, which names it, for any other."""
        try:
            return cls.from_json(json.loads(read_head(path, _LARGEST, "a file of rwopt cost --out")))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({one_line(str(error))}): give a file of rwopt cost --out") from None
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None

    @classmethod
    def from_json(cls, document: Any) -> CostTable:
        """The inverse of `to_json`; what else is in the document is left alone. UserError for anything else."""
        try:
            own = {f.name: document[f.name] for f in fields(cls) if f.name in document}
            table = cls(**{**own, "shape": tuple(int(n) for n in own["shape"])})
            shares = [value for part in (table.operations, table.time) for value in part.values()]
            numbers = [*shares, table.seconds, table.multiply_adds]
            fits = all(math.isfinite(n) and n >= 0 for n in numbers) and isinstance(table.guided, bool)
            if not fits or not all(math.isfinite(n) for n in table.sites.values()):  # a share may be below 0 by noise
                raise ValueError("a number that is none")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            reason = one_line(str(error))
            raise UserError(f"this is no cost table ({reason}): make one with rwopt cost MODEL --out FILE") from None
        return table


def _key(action: Action) -> str:
    """Order 1 under order 0, extrapolate and mean under reuse, one side of guidance under the other."""
    sites = tuple((name, "skip" if rule == "skip" else "reuse") for name, rule in action.sites)
    side = "both" if action.cfg_branch == "both" else "cond"
    return replace(action, order=0, sites=sites, cfg_branch=side).letter


def standard_actions(unet: nn.Module, guided: bool) -> tuple[Action, ...]:
    """Every cut, the encoder, guidance where there is one, and each site kind that the U-Net has."""
    kinds = {site.kind for site in list_sites(unet, SITE_KINDS)}
    found = [Action("sites", sites=((kind, "reuse"),)) for kind in SITE_KINDS if kind in kinds]
    try:
        cuts = [Action("cut", k) for k in range(1, Layout(unet).skips + 1)] + [Action("encoder")]
    except UserError:
        cuts = []
    return (*cuts, *([Action("guidance")] if guided else []), *found)


def cost_table(
    unet: nn.Module,
    shape: Sequence[int],
    rest: Mapping[str, Any],
    guided: bool = True,
    actions: Iterable[Action] | None = None,
    rounds: int = 7,
    timestep: float = 500,
) -> CostTable:
    """Measure `actions` (None: `standard_actions`), each `rounds` times beside a full call.

    shape: of the sample, such as (2, 4, 64, 64), rows first; rest: the other arguments of a U-Net call, with as many
    rows. The U-Net and what is in `rest` are used as they are, so device and number format are those of the search.
    """
    parameter = next(unet.parameters())
    x = torch.randn(*shape, device=parameter.device, dtype=parameter.dtype)
    chosen = [replace(a, order=0) for a in (standard_actions(unet, guided) if actions is None else actions)]
    chosen = [a for a in dict.fromkeys(chosen) if a.kind not in ("full", "output")]
    times, operations, sites = dict[str, float](), dict[str, float](), dict[str, float]()
    with Attachment(unet, ()) as attachment, torch.no_grad():
        calls = {action: _calls(attachment, action, x, timestep, rest, guided) for action in chosen}
        full = _runner(attachment, None, x, timestep, rest)
        whole = _operations(full)
        full()  # first calls choose kernels
        seconds = []
        for action, cheap in calls.items():
            cheap()
            pairs = [(_seconds(full, x), _seconds(cheap, x)) for _ in range(rounds)]
            seconds += [one for one, _ in pairs]
            key = _key(action)
            times[key] = statistics.median(other / one for one, other in pairs)
            operations[key] = _operations(cheap) / whole
            if action.kind == "sites" and len(action.sites) == 1 and not action.paired:
                sites[action.sites[0][0]] = 1.0 - times[key]
    return CostTable(
        operations, times, statistics.median(seconds or [_seconds(full, x)]), whole, tuple(shape), guided,
        str(parameter.device), str(parameter.dtype).removeprefix("torch."), torch.get_num_threads(), sites,
    )  # fmt: skip


def _calls(
    attachment: Attachment, action: Action, x: Tensor, t: float, rest: Mapping[str, Any], guided: bool
) -> Callable[[], Any]:
    """A call with `action`, what it takes having been computed once."""
    acts = attachment.acts(Actions((Level(2.0), Level(1.0, action, 10.0))))
    past, frame = acts.frame(Past(), 2.0, guided)
    _runner(attachment, frame, x, t, rest)()
    past, frame = acts.frame(acts.after(past, frame, 2.0), 1.0, guided)
    if frame.pattern.action == FULL:
        raise UserError(f"action {action.letter} does not fit this call: give rows [unconditional, conditional]")
    return _runner(attachment, replace(frame, keep=frozenset()), x, t, rest)


def _runner(
    attachment: Attachment, frame: Frame | None, x: Tensor, t: float, rest: Mapping[str, Any]
) -> Callable[[], Any]:
    others = dict(rest)
    text = others.pop("encoder_hidden_states", None)
    call = attachment if frame is None else attachment.with_frame(frame)
    return lambda: call(x, t, text, None, **others)


def operation_counter() -> FlopCounterMode:
    """Counts two operations a multiply-add. PyTorch's own does not know the fused attention of processors."""

    def fused(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    return FlopCounterMode(display=False, custom_mapping={_FUSED: fused})


def _operations(call: Callable[[], Any]) -> float:
    """Multiply-adds of a call."""
    with operation_counter() as counter:
        call()
    return float(counter.get_total_flops()) / 2


class Watch:
    """Time of this thread's processor (with several threads, of the process); on a GPU, of the device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._clock = time.process_time if torch.get_num_threads() > 1 else time.thread_time

    def now(self) -> Any:
        """A moment, of use for `seconds` alone."""
        if not self.cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two moments. Waits for the device to have reached the second."""
        if not self.cuda:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def _seconds(call: Callable[[], Any], x: Tensor) -> float:
    watch = Watch(x.device)
    begin = watch.now()
    call()
    return watch.seconds(begin, watch.now())
