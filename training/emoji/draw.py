"""Fetch and rasterise every drawing, and write the cases. Run: `python -m training.emoji.draw` (5 minutes, 2 cores).

Needs `npm` and `pip install -e '.[train]'`. Writes `training/cache/emoji/` (drawings uint8 [N, 80, 80, 4], their
looks) and the versioned cases in `data/emoji/`. A case's wanted combination of style, subject, skin, gender and hair
is in no other split and in no picture that a network is trained on; what it is an edit of may be.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import tarfile
from collections import defaultdict
from dataclasses import asdict, replace
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from training.emoji.drawings import CACHE, DATA, SIDE, SIZE, Drawings
from training.emoji.world import (
    ATTRIBUTE,
    BACKGROUNDS,
    KINDS,
    STYLES,
    Look,
    caption,
    hidden,
    looks,
    plain,
    target,
)

PACKAGES = {"3d": "@lobehub/fluent-emoji-3d@1.1.0", "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
            "noto": "@iconify-json/noto@1.2.9"}  # fmt: skip
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
SPLITS = {"tuning": ("train", 128), "validation": ("validation", 128), "test": ("test", 256)}
"""Of each split of combinations: the name of its cases, and how many edits and captions."""


def fetch(style: str) -> Path:
    """The unpacked npm package of one style."""
    folder = CACHE / "npm" / style
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        said = subprocess.run(["npm", "pack", PACKAGES[style]], cwd=folder.parent, check=True, capture_output=True)
        archive = folder.parent / said.stdout.decode().split()[-1]
        with tarfile.open(archive) as packed:
            packed.extractall(folder.parent / f".{style}", filter="data")
        os.replace(folder.parent / f".{style}", folder)
        archive.unlink()
    return folder / "package"


def raster(drawing: str | Path) -> np.ndarray:
    """One drawing, SVG text or the path of a picture, as uint8 [80, 80, 4]."""
    if isinstance(drawing, Path):
        picture = Image.open(drawing).convert("RGBA")
    else:
        import resvg_py

        png = resvg_py.svg_to_bytes(svg_string=drawing, width=4 * SIDE, height=4 * SIDE, skip_system_fonts=True)
        picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def icons(style: str) -> dict[tuple[str, ...], str]:
    """SVG text by code points of an Iconify set."""
    folder = fetch(style)
    chars, data = (json.loads((folder / name).read_text()) for name in ("chars.json", "icons.json"))
    out = {}
    for points, name in chars.items():
        icon = data["icons"].get(data.get("aliases", {}).get(name, {}).get("parent", name))
        if icon is not None:
            size = icon.get("width", data["width"])
            out[plain(points)] = f'<svg {NAMESPACES} viewBox="0 0 {size} {size}">{icon["body"]}</svg>'
    return out


def sources() -> dict[Look, str | Path]:
    """What each drawing is made from, in a fixed order."""
    drawn: dict[str, dict[tuple[str, ...], Any]] = {
        "3d": {plain(p.stem): p for p in sorted((fetch("3d") / "assets").glob("*.webp"))},
        "flat": icons("flat"), "noto": icons("noto"),
    }  # fmt: skip
    found = looks(set.intersection(*(set(found) for found in drawn.values())))
    return {replace(look, style=style): drawn[style][key] for key, look in found.items() for style in STYLES}


def rasterise(processes: int | None) -> None:
    """Write the drawings, whole or not at all."""
    todo = sources()
    with Pool(processes) as pool:
        pixels = np.stack(pool.map(raster, todo.values(), chunksize=32))
    (CACHE / "looks.json").write_text(json.dumps([asdict(look) for look in todo]))
    np.save(CACHE / ".drawings.npy", pixels)
    os.replace(CACHE / ".drawings.npy", CACHE / "drawings.npy")


def edits_to(look: Look, kind: str, known: dict[tuple[object, ...], list[Look]]) -> list[Look]:
    """The looks from which an edit of one kind ends at `look`."""
    if kind == "background":
        return [look]
    if kind == "occupation" and not look.job:
        return []
    if kind == "hair" and look.hair is None:
        return []
    same = [o for o in known[_without(look, ATTRIBUTE[kind])] if o != look]
    return [o for o in same if o.job] if kind == "occupation" else same


def _without(look: Look, name: str) -> tuple[object, ...]:
    return (name, *(getattr(look, n) for n in ("style", "subject", "skin", "gender", "hair") if n != name))


def make_cases(drawings: Drawings, split: str, name: str, count: int, seed: int) -> None:
    """Edits and captions of one split, with the pictures before and after each edit."""
    rng = np.random.default_rng([seed, count, len(split)])
    known: defaultdict[tuple[object, ...], list[Look]] = defaultdict(list)
    place = {look: i for i, look in enumerate(drawings.looks)}
    for look, where in zip(drawings.looks, drawings.split, strict=True):
        if where in ("train", split):
            for attribute in ATTRIBUTE.values():
                known[_without(look, attribute)].append(look)
    wanted = [drawings.looks[i] for i in drawings.rows(split).tolist()]
    colours, rows, pairs = list(BACKGROUNDS), [], []
    taken: set[tuple[Look, Look, str, str]] = set()
    while len(pairs) < count:
        kind, after = KINDS[len(pairs) % len(KINDS)], wanted[int(rng.integers(len(wanted)))]
        origins = edits_to(after, kind, known)
        if not origins:
            continue
        before, colour = origins[int(rng.integers(len(origins)))], str(rng.choice(colours))
        old = str(rng.choice([c for c in colours if c != colour])) if kind == "background" else colour
        if (before, after, old, colour) in taken or (before != after and drawings.same(place[before], place[after])):
            continue  # Noto draws the same astronaut for a man and a woman
        taken.add((before, after, old, colour))
        pairs.append((kind, before, after, old, colour))
    for i, (kind, before, after, old, colour) in enumerate(pairs):
        attribute = ATTRIBUTE[kind]
        rows.append({
            "id": f"{name}-edit-{i:03d}", "task": "editing", "kind": kind, "cell": i,
            "source_caption": caption(before, old), "caption": caption(after, colour),
            "change": {attribute: target(after, colour)[attribute]}, "hidden": hidden(after),
            "source": target(before, old), "target": target(after, colour),
        })  # fmt: skip
    for i, k in enumerate(rng.choice(len(wanted) * len(colours), size=count, replace=False).tolist()):
        look, colour = wanted[k // len(colours)], colours[k % len(colours)]
        rows.append({
            "id": f"{name}-caption-{i:03d}", "task": "generation", "caption": caption(look, colour),
            "hidden": hidden(look), "target": target(look, colour),
        })  # fmt: skip
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    poses = drawings.poses(count, torch.Generator().manual_seed(seed))
    for which, (look_at, colour_at) in {"source": (1, 3), "truth": (2, 4)}.items():
        chosen = torch.tensor([place[pair[look_at]] for pair in pairs])
        backgrounds = torch.tensor([colours.index(pair[colour_at]) for pair in pairs])
        pictures = (drawings.compose(chosen, backgrounds, poses) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        sheet(pictures, DATA / f"{name}_{which}.png")


def sheet(pictures: np.ndarray, path: Path, columns: int = 16) -> None:
    """One PNG with 16 pictures a row: small in git, and a reader can look at it."""
    rows = pictures.reshape(-1, columns, SIZE, SIZE, 3).transpose(0, 2, 1, 3, 4)
    Image.fromarray(rows.reshape(-1, columns * SIZE, 3)).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if not (CACHE / "drawings.npy").exists():
        rasterise(args.processes)
    drawings = Drawings.load()
    for split, (name, count) in SPLITS.items():
        make_cases(drawings, split, name, count, args.seed)
    print(f"{len(drawings.looks)} drawings of {len(drawings.subjects)} subjects")


if __name__ == "__main__":
    main()
