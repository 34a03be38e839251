"""Draw every picture that training, judges and evaluation use. Run: `python training/draw.py` (5 minutes, 2 cores).

Writes `training/cache/pool_<name>.npz` (pictures uint8 [N, 2, 64, 64, 3]: a person and one edit of that person with the
same pose; `values` int8 [N, 2, 10]) and the versioned cases in `data/avatars/`. Identities (attribute combinations,
edited ones included) are drawn once, so that no two pools or splits share one.
"""

from __future__ import annotations

import argparse
import json
import os
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

from world import EDITS, NAMES, Person, Pose, caption, draw_edit, draw_person, draw_pose, labels, render

ROOT = Path(__file__).resolve().parent
CACHE, DATA = ROOT / "cache", ROOT.parent / "data" / "avatars"
POOLS = {"generator": 18_000, "scorer": 7_000, "judge": 7_000, "unseen": 1_000}
SPLITS = {"train": 128, "validation": 128, "test": 256}
Pair = tuple[Person, Person, str, Pose]


def key(person: Person) -> tuple[str, ...]:
    return tuple(person[n] for n in NAMES)


def draw_pairs(count: int, rng: np.random.Generator, taken: set[tuple[str, ...]], balanced: bool) -> list[Pair]:
    """`count` people that nobody else has, each with one edit; `balanced` gives every kind of edit its turn."""
    pairs: list[Pair] = []
    kinds = list(EDITS)
    while len(pairs) < count:
        person = draw_person(rng)
        edit = draw_edit(person, rng, kinds[len(pairs) % len(kinds)] if balanced else None)
        if edit is None or key(person) in taken or key(edit[1]) in taken:
            continue
        taken.update((key(person), key(edit[1])))
        pairs.append((person, edit[1], edit[0], draw_pose(rng)))
    return pairs


def draw_pair(pair: Pair) -> np.ndarray:
    return np.stack([render(pair[0], pair[3]), render(pair[1], pair[3])])


def values(pairs: list[Pair]) -> np.ndarray:
    return np.array([[[NAMES[n].index(p[n]) for n in NAMES] for p in pair[:2]] for pair in pairs], dtype=np.int8)


def save_pool(name: str, pairs: list[Pair], pictures: np.ndarray) -> None:
    temporary = CACHE / f".pool_{name}.npz"
    np.savez(temporary, pictures=pictures, values=values(pairs), kinds=np.array([p[2] for p in pairs]))
    os.replace(temporary, CACHE / f"pool_{name}.npz")


def sheet(pictures: np.ndarray, path: Path, columns: int = 16) -> None:
    """One PNG with 16 pictures a row: small in git, and a reader can look at it."""
    rows = pictures.reshape(-1, columns, 64, 64, 3).transpose(0, 2, 1, 3, 4)
    Image.fromarray(rows.reshape(-1, columns * 64, 3)).save(path, optimize=True)


def hidden(person: Person) -> list[str]:
    """Attributes that the picture does not show."""
    return [n for n, label in zip(NAMES, labels(person), strict=True) if label < 0]


def save_cases(split: str, edits: list[Pair], people: list[Pair], pictures: np.ndarray) -> None:
    with open(DATA / f"{split}.jsonl", "w") as out:
        for i, (source, target, kind, _) in enumerate(edits):
            attribute = EDITS[kind][0]
            out.write(json.dumps({
                "id": f"{split}-edit-{i:03d}", "task": "editing", "kind": kind, "cell": i,
                "source_caption": caption(source), "caption": caption(target),
                "change": {attribute: target[attribute]}, "hidden": hidden(target), "source": source, "target": target,
            }) + "\n")  # fmt: skip
        for i, (person, _, _, _) in enumerate(people):
            out.write(json.dumps({
                "id": f"{split}-caption-{i:03d}", "task": "generation", "caption": caption(person),
                "hidden": hidden(person), "target": person,
            }) + "\n")  # fmt: skip
    sheet(pictures[:, 0], DATA / f"{split}_source.png")
    sheet(pictures[:, 1], DATA / f"{split}_truth.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    CACHE.mkdir(exist_ok=True)
    DATA.mkdir(parents=True, exist_ok=True)
    rng, taken = np.random.default_rng(args.seed), set[tuple[str, ...]]()
    with Pool(args.processes) as pool:
        for split, count in SPLITS.items():
            edits = draw_pairs(count, rng, taken, balanced=True)
            people = draw_pairs(count, rng, taken, balanced=False)
            save_cases(split, edits, people, np.stack(pool.map(draw_pair, edits, chunksize=32)))
        for name, count in POOLS.items():
            pairs = draw_pairs(count, rng, taken, balanced=False)
            if not (CACHE / f"pool_{name}.npz").exists():  # a killed run goes on where it stopped
                save_pool(name, pairs, np.stack(pool.map(draw_pair, pairs, chunksize=64)))
            print(name, count, flush=True)


if __name__ == "__main__":
    main()
