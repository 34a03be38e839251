"""Schedules on the Hugging Face Hub: a folder of schedule file, model card and picture, and the way there and back.

Methods have the names and arguments of the Hub's other libraries, and all network traffic is `huggingface_hub`'s own.
`ModelHubMixin` is not used: it keeps the arguments of a class's constructor as a `config.json`, and here the schedule
file, which is checked when it is read, is all there is.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rwopt.errors import UserError, one_line
from rwopt.files import write_bytes, write_text
from rwopt.schedule.noise import Array

if TYPE_CHECKING:
    from rwopt.schedule.steps import Steps

FILE, CARD, PICTURE = "schedule.json", "README.md", "schedule.png"
"""What such a folder holds."""

LIBRARY = "rwopt"
TAGS = (LIBRARY, "weight-schedule", "diffusers")

_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")  # an owner's; names without one are the Hub's oldest models
_RESULTS = ("objective", "validation", "evaluations", "calls", "seed", "choice", "imported", "edits", "rwopt")
_MADE_WITH = ("task", "method", "num_inference_steps", "scheduler", "guidance_scale", "strength", "resolution")


class ScheduleLike(Protocol):
    """What is asked of a schedule here; `rwopt.Schedule` has it."""

    sites: tuple[str, ...]
    sigmas: Array
    weights: Array
    mode: str
    interp: str
    model: Mapping[str, Any]
    calibrated: Mapping[str, Any]
    provenance: Mapping[str, Any]
    steps: Steps | None

    def digest(self) -> str: ...
    def save(self, path: str | PathLike[str]) -> Path: ...
    @classmethod
    def load(cls: type[S], path: str | PathLike[str]) -> S: ...
    def save_pretrained(self, folder: str | PathLike[str], *, license: str = ..., name: str = ...) -> list[Path]: ...


S = TypeVar("S", bound=ScheduleLike)


class Hub:
    """The methods that carry a schedule to the Hub and back; a base of `rwopt.Schedule`."""

    def save_pretrained(
        self: ScheduleLike, folder: str | PathLike[str], *, license: str = "unknown", name: str = ""
    ) -> list[Path]:
        """Write schedule.json, README.md (a model card) and schedule.png (a heat map); the files written.

        license: an identifier of the Hub's, such as "apache-2.0"; name: the repository, for the card's example. Other
        files in the folder stay.
        """
        place = Path(folder)
        if place.is_file():
            raise UserError(f"{place}: is a file: give a folder")
        try:
            written = [self.save(place / FILE), write_bytes(place / PICTURE, picture(self))]
            return [*written, write_text(place / CARD, card(self, license, name or "you/your-schedule"))]
        except OSError as error:
            raise UserError(f"{place}: cannot be written ({error.strerror or error}): give another folder") from None

    @classmethod
    def from_pretrained(
        cls: type[S],
        name: str | PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> S:
        """The schedule of a folder, a schedule file, or a repository of the Hub (`owner/name`).

        revision: a branch, tag or commit; token, cache_dir, local_files_only: as everywhere in `huggingface_hub`.
        UserError of one line for what cannot be had or is no schedule.
        """
        place = Path(name)
        if place.exists():
            return cls.load(place / FILE if place.is_dir() else place)
        if not _REPOSITORY.fullmatch(str(name)):
            raise UserError(f"{one_line(str(name))}: is no folder or file, and no id of the Hub: give owner/name")
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        given: dict[str, Any] = {"revision": revision, "token": token, "local_files_only": local_files_only}
        try:
            path = hf_hub_download(str(name), FILE, cache_dir=cache_dir, library_name=LIBRARY, **given)
        except LocalEntryNotFoundError:
            raise UserError(f"{name}: cannot be fetched, and is in no cache: check the connection") from None
        except EntryNotFoundError:
            raise UserError(f"{name}: has no {FILE} on the Hub: give a repository of a schedule") from None
        except Exception as error:
            raise UserError(f"{name}: cannot be fetched from the Hub ({_why(error)})") from None
        return cls.load(path)

    def push_to_hub(
        self: ScheduleLike,
        repo_id: str,
        *,
        license: str = "unknown",
        commit_message: str = "Schedule of block weights",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Make the repository if need be and commit what `save_pretrained` writes; the commit's address.

        token: None for that of `hf auth login`. UserError of one line if the Hub refuses or cannot be reached.
        """
        if not _REPOSITORY.fullmatch(repo_id):
            raise UserError(f"repo_id={one_line(repo_id)}: give owner/name")
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name=LIBRARY)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, license=license, name=repo_id)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                if branch is not None:
                    api.create_branch(repo_id, branch=branch, exist_ok=True)
                done = api.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=branch,
                    create_pr=create_pr,
                )  # fmt: skip
            except Exception as error:
                raise UserError(f"{repo_id}: cannot be written on the Hub ({_why(error)})") from None
        return str(done.commit_url)


def _why(error: Exception) -> str:
    """The first words of an error of `huggingface_hub`, of which there are many kinds, or of the network's."""
    return one_line(str(error).strip() or type(error).__name__, 160)


def card(schedule: ScheduleLike, license: str, name: str) -> str:
    """The text of a model card: front matter that the Hub reads, the picture, an example, and where it comes from."""
    from huggingface_hub import ModelCardData

    base = str(schedule.model.get("base_model", ""))
    known = bool(_REPOSITORY.fullmatch(base))  # not a folder on somebody's disk
    family = str(schedule.model.get("family", ""))
    tags = [*TAGS, *([family] if re.fullmatch(r"[\w.-]{1,40}", family) else [])]
    data = ModelCardData(base_model=base if known else None, license=license, library_name=LIBRARY, tags=tags)
    sites, levels = len(schedule.sites), len(schedule.sigmas)
    rule = "x + w f(x)" if schedule.mode == "residual" else "w (x + f(x))"
    about = _cell(base if known else family or "an unnamed model")
    call, steps = ("", "") if schedule.steps is None else (
        ", **handle.arguments",
        f" It also sets the sampler's own dials: {len(schedule.steps)} calls of {_cell(schedule.steps.sampler)}.",
    )  # fmt: skip
    parts = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# A schedule of block weights for {about}",
        f"How much {sites} blocks of the U-Net count at {levels} noise levels, `{rule}` (1 is the plain model); "
        f"{_cell(schedule.interp)} in ln sigma between them.{steps}",
        f"![weights over noise level and site]({PICTURE})",
        "```python\nimport rwopt\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{base if known else "the base model"}")\n'
        f'handle = rwopt.apply(pipe, rwopt.Schedule.from_pretrained("{name}"))\n'
        f'image = pipe("a cat"{call}).images[0]\n```',
        _table("Results", "", schedule.provenance, _RESULTS),
        _table("Made with", "At other settings the weights are a guess.", schedule.calibrated, _MADE_WITH),
        f"SHA-256 of what it does: `{schedule.digest()}`",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(heading: str, note: str, values: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """A section with those of `values` that are there; "" if none is."""
    rows = [f"| {name.replace('_', ' ')} | {_cell(values[name])} |" for name in names if values.get(name) is not None]
    if not rows:
        return ""
    table = "\n".join(["| | |", "|---|---|", *rows])
    return "\n\n".join(part for part in (f"## {heading}", note, table) if part)


def _cell(value: object) -> str:
    """A note as text that keeps to its cell: files are other people's."""
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    elif isinstance(value, list | tuple):
        text = ", ".join(map(_cell, value))
    else:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return re.sub(r"([|`<>\[\]!\\])", r"\\\1", one_line(text, 300))


def picture(schedule: ScheduleLike) -> bytes:
    """The weights as a PNG: noise level from left to right, sites from top to bottom; white is 1, red more, blue less.

    Smaller and plainer than a run's (`rwopt.report`), which this floor does not know.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    table = np.asarray(schedule.weights).T
    reach = max(0.05, float(np.abs(table - 1).max()))
    figure = Figure(figsize=(8, min(40.0, 1.5 + 0.22 * len(table))), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = axes.imshow(table, cmap="RdBu_r", norm=TwoSlopeNorm(1, 1 - reach, 1 + reach), aspect="auto")
    shown = range(0, len(table), 1 + len(table) // 180)  # what has room
    axes.set_yticks([*shown], [schedule.sites[i] for i in shown], fontsize=7)
    levels = range(0, table.shape[1], 1 + table.shape[1] // 12)
    axes.set_xticks([*levels], [f"{schedule.sigmas[k]:.3g}" for k in levels], fontsize=8)
    axes.set_xlabel("noise level σ (from the first step to the last)")
    figure.colorbar(drawn, label="weight (1 = the plain model)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
