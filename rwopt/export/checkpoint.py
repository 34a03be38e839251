"""A single .safetensors file in LDM's layout, as A1111, Forge and ComfyUI load it, with weights folded into it.

The file is copied, and only the last layers of the weighed branches are written anew (`rwopt.export.fold` says which):
`proj_out` of transformers, `attn1.to_out.0`, `attn2.to_out.0` and `ff.net.2` of their blocks, `out_layers.3` of
resnets. All other tensors keep their bytes, so text encoders and VAE are those of before; one tensor at a time is in
memory. EMA copies (`model_ema.`), which no tool loads unless told to, stay plain.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rwopt.errors import UserError
from rwopt.export.ldm import kind_of
from rwopt.export.plain import place_of
from rwopt.schedule import Schedule
from rwopt.schedule.document import FORMAT
from rwopt.unet.names import foreign_names
from rwopt.unet.sites import BRANCHES, short

SUFFIX = ".safetensors"

Header = dict[str, dict[str, Any]]
"""Name of a tensor -> its "dtype", "shape" and "data_offsets", in the order of the file."""

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ENDS = {"transformer": r"proj_out", "resnet": r"out_layers\.3", "ff": r"transformer_blocks\.\d+\.ff\.net\.2"} | {
    kind: rf"transformer_blocks\.\d+\.{BRANCHES[kind]}\.to_out\.0" for kind in ("self", "cross")
}


def fold_file(schedule: Schedule, weights: Sequence[float], source: Path, place: Path) -> list[Path]:
    """Write `source` with weights [S] of the schedule's sites folded in as `place`; the file written.

    UserError for what is no LDM file, sites that it lacks or that cannot be folded, and tensors of reduced precision.
    """
    if place.suffix != SUFFIX:
        raise UserError(f"out={place}: a single file is written as one: give a name that ends in {SUFFIX}")
    if place.exists() and place.samefile(source):
        raise UserError(f"out={place}: is the file to read: give another name")
    header, start = _read_header(source)
    scales = _scales(schedule, weights, header, source)
    notes = {FORMAT: json.dumps(schedule.to_dict())}  # first, where the next export looks for it
    notes |= {name: text for name, text in header.pop("__metadata__", {}).items() if name != FORMAT}
    text = json.dumps({"__metadata__": notes, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".rwopt") as folder:  # a whole file, under its name
        made = Path(folder) / place.name
        with source.open("rb") as old, made.open("wb") as new:
            new.write(len(text).to_bytes(8, "little") + text)
            base = new.tell()
            old.seek(start)
            shutil.copyfileobj(old, new, 1 << 22)
            for name, weight in scales.items():
                first, last = header[name]["data_offsets"]
                old.seek(start + first)
                new.seek(base + first)
                new.write(_scaled(old.read(last - first), header[name]["dtype"], weight))
        os.replace(made, place)
    return [place]


def _read_header(path: Path) -> tuple[Header, int]:
    """The header, and where the tensors' bytes begin."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != SUFFIX:
        raise UserError(f"unet={path}: a {path.suffix} may run anything when read: give a {SUFFIX} file")
    try:
        with safe_open(path, "np"), path.open("rb") as file:  # which checks names, sizes and places
            return _parsed(file)
    except OSError as error:
        raise UserError(f"unet={path}: cannot be read ({error.strerror or error}): give a model") from None
    except SafetensorError as error:
        raise UserError(f"unet={path}: is no {SUFFIX} file ({str(error).splitlines()[0]}): give a model") from None


def _parsed(file: BinaryIO) -> tuple[Header, int]:
    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(length)), 8 + length


def _scales(schedule: Schedule, weights: Sequence[float], header: Header, source: Path) -> dict[str, float]:
    """Tensor -> what it is multiplied by; those of weight 1 are left out, and keep their bytes."""
    prefix = next((p for p in _PREFIXES if f"{p}input_blocks.0.0.weight" in header), None)
    if prefix is None:
        raise UserError(f"unet={source}: has no U-Net in LDM's layout: give a file of Stable Diffusion 1.x, 2.x or XL")
    inside = [name.removeprefix(prefix) for name in header if name.startswith(prefix)]
    down, up = (_layers(inside, side, end) for side, end in (("input", r"0\.op"), ("output", r"\d\.conv")))
    scales: dict[str, float] = {}
    absent = []
    for site, weight in zip(schedule.sites, weights, strict=True):
        kind = kind_of(site)
        if kind not in _ENDS:
            raise UserError(f"site {site} cannot be folded: export the schedule without it")
        place = foreign_names(place_of(site), kind, down, up).ldm
        pattern = re.compile(rf"{re.escape(str(place))}\.{_ENDS[kind]}\.(weight|bias)")
        found = [prefix + name for name in inside if pattern.fullmatch(name)] if _is_there(site, down, up) else []
        absent += [] if found else [site]
        for name in found:
            dtype = header[name]["dtype"]
            if dtype not in _TYPES:
                raise UserError(f"site {site} has weights of type {dtype}: give a file of 16 or 32 bit")
            if weight != 1:
                scales[name] = weight
    if absent:
        raise UserError(f"{len(absent)} of {len(schedule.sites)} sites are absent from {source} ({short(absent)}): "
                        "use a schedule made for it, or map it")  # fmt: skip
    return scales


def _layers(names: Sequence[str], side: str, end: str) -> list[int]:
    """Resnets of each block of a side. A block ends with the layer that resizes, which downwards is one of its own."""
    counts = [int(n) for n in {name.split(".")[1] for name in names if name.startswith(f"{side}_blocks.")}]
    ends = {int(m[1]) for m in (re.fullmatch(rf"{side}_blocks\.(\d+)\.{end}\.weight", name) for name in names) if m}
    last = max(counts, default=0)
    edges = sorted({*ends, last + 1 if side == "input" else last})
    starts = [0, *edges[:-1]] if side == "input" else [-1, *edges[:-1]]
    return [b - a - (side == "input") for a, b in zip(starts, edges, strict=True)]


def _is_there(site: str, down: Sequence[int], up: Sequence[int]) -> bool:
    """Whether the block and its layer exist: counted through, the next block's would be found instead."""
    match = re.match(r"(down|up)_blocks\.(\d+)\.\w+\.(\d+)", site)
    if match is None:
        return True
    blocks = down if match[1] == "down" else up
    return int(match[2]) < len(blocks) and int(match[3]) < blocks[int(match[2])]


def _scaled(content: bytes, dtype: str, weight: float) -> bytes:
    """A tensor's bytes times `weight`: product in double precision, rounded once."""
    import torch

    if not content:
        return content
    kind = getattr(torch, _TYPES[dtype])
    values = torch.frombuffer(bytearray(content), dtype=kind)
    return (values.double() * weight).to(kind).view(torch.uint8).numpy().tobytes()
