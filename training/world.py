"""The avatar world: attributes, captions, identities, and how one picture is drawn.

A picture is a function of a `Person` (eleven named attributes, each with few and clearly distinct values) and a
`Pose` (zoom, shift, mirror, eyebrows: never in the caption, so that two people with the same caption still differ).
Drawn by `python_avatars` (MIT) as SVG and rasterised by `resvg_py`; both are needed at build time only.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

SIZE = 64

# attribute -> {word(s) used in captions: drawing value}; the order of both levels is the order of the judges' heads
ATTRIBUTES: dict[str, dict[str, str]] = {
    "skin": {"pale": "#FFDBB4", "tan": "#DDA06E", "brown": "#A5602F", "dark": "#543427"},
    "hair": {"bald": "NONE", "short": "SHORT_FLAT", "bun": "BUN", "bob": "BOB", "long": "STRAIGHT_STRAND",
             "afro": "FRO", "mohawk": "MOHAWK", "shaggy": "SHAGGY"},
    "hair_color": {"black": "#17131A", "brown": "#7A4526", "blonde": "#EBC44F", "red": "#CC3A0E",
                   "gray": "#B9BEC6", "pink": "#F06CB4"},
    "facial_hair": {"clean shaven": "NONE", "moustache": "MOUSTACHE_MAGNUM", "beard": "BEARD_MEDIUM"},
    "glasses": {"no glasses": "NONE", "glasses": "PRESCRIPTION_2", "sunglasses": "WAYFARERS"},
    "eyes": {"calm eyes": "DEFAULT", "wide eyes": "SURPRISED", "heart eyes": "HEART"},
    "mouth": {"smile": "BIG_SMILE", "serious": "SERIOUS", "scream": "SCREAM_OPEN", "grimace": "GRIMACE"},
    "clothing": {"shirt": "SHIRT_CREW_NECK", "hoodie": "HOODIE", "overalls": "OVERALL"},
    "clothing_color": {"red": "#E0323C", "blue": "#2C5FD0", "green": "#2FA84F", "yellow": "#F5D02E",
                       "white": "#F4F4F4", "black": "#23292E"},
    "background": {"sky": "#9BD3F5", "violet": "#A98BEA", "mint": "#9FE5C5", "peach": "#FFC39B",
                   "gray": "#8A8F98", "navy": "#27355E"},
}  # fmt: skip
NAMES = {name: tuple(values) for name, values in ATTRIBUTES.items()}
EYEBROWS = ("DEFAULT", "RAISED_EXCITED", "ANGRY")

# kind of edit -> (attribute, admissible source values, admissible target values)
EDITS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "hair_color": ("hair_color", NAMES["hair_color"], NAMES["hair_color"]),
    "glasses_on": ("glasses", ("no glasses",), ("glasses", "sunglasses")),
    "glasses_off": ("glasses", ("glasses", "sunglasses"), ("no glasses",)),
    "clothing_color": ("clothing_color", NAMES["clothing_color"], NAMES["clothing_color"]),
    "background": ("background", NAMES["background"], NAMES["background"]),
    "facial_hair": ("facial_hair", NAMES["facial_hair"], NAMES["facial_hair"]),
    "expression": ("mouth", NAMES["mouth"], NAMES["mouth"]),
}

Person = dict[str, str]


@dataclass(frozen=True)
class Pose:
    """What no caption says: `zoom` around 1, `dx`, `dy` in SVG units (264 wide), `mirror`, `eyebrows`."""

    zoom: float
    dx: float
    dy: float
    mirror: bool
    eyebrows: str


def draw_person(rng: np.random.Generator) -> Person:
    person = {name: str(rng.choice(values)) for name, values in NAMES.items()}
    if person["hair"] == "bald" and rng.random() < 0.6:  # fewer bald heads: they have no hair colour to edit
        person["hair"] = str(rng.choice(NAMES["hair"][1:]))
    return person


def draw_pose(rng: np.random.Generator) -> Pose:
    return Pose(
        zoom=float(rng.uniform(0.96, 1.05)),
        dx=float(rng.uniform(-7, 7)),
        dy=float(rng.uniform(-5, 5)),
        mirror=bool(rng.random() < 0.5),
        eyebrows=str(rng.choice(EYEBROWS)),
    )


def draw_edit(person: Person, rng: np.random.Generator, kind: str | None = None) -> tuple[str, Person] | None:
    """One edit of `person`: (kind, edited person), or None where `kind` does not apply to this person."""
    kinds = [kind] if kind else list(EDITS)
    possible = [
        k
        for k in kinds
        if person[EDITS[k][0]] in EDITS[k][1] and not (k == "hair_color" and person["hair"] == "bald")
    ]
    if not possible:
        return None
    chosen = str(rng.choice(possible))
    attribute, _, targets = EDITS[chosen]
    value = str(rng.choice([t for t in targets if t != person[attribute]]))
    return chosen, {**person, attribute: value}


def caption(person: Person, keep: set[str] | None = None) -> str:
    """The caption in plain words; only the attributes in `keep` are named (default all)."""
    p, parts = person, ["portrait"]

    def said(*names: str) -> bool:
        return keep is None or all(n in keep for n in names)

    if said("skin"):
        parts.append(f"{p['skin']} skin")
    if said("hair"):
        if p["hair"] == "bald":
            parts.append("bald head")
        else:
            parts.append(f"{p['hair']} {p['hair_color'] + ' ' if said('hair_color') else ''}hair")
    if said("facial_hair"):
        parts.append(p["facial_hair"])
    if said("glasses"):
        parts.append(p["glasses"])
    if said("eyes"):
        parts.append(p["eyes"])
    if said("mouth"):
        parts.append(f"{p['mouth']} mouth")
    if said("clothing"):
        parts.append(f"{p['clothing_color'] + ' ' if said('clothing_color') else ''}{p['clothing']}")
    if said("background"):
        parts.append(f"{p['background']} background")
    return ", ".join(parts)


def render(person: Person, pose: Pose) -> np.ndarray:
    """uint8 [64, 64, 3]."""
    import python_avatars as pa
    import resvg_py

    def value(name: str) -> str:
        return ATTRIBUTES[name][person[name]]

    arguments: dict[str, Any] = {
        "style": pa.AvatarStyle.TRANSPARENT,
        "skin_color": value("skin"),
        "top": pa.HairType[value("hair")],
        "hair_color": value("hair_color"),
        "facial_hair": pa.FacialHairType[value("facial_hair")],
        "facial_hair_color": value("hair_color"),
        "accessory": pa.AccessoryType[value("glasses")],
        "eyes": pa.EyeType[value("eyes")],
        "mouth": pa.MouthType[value("mouth")],
        "eyebrows": pa.EyebrowType[pose.eyebrows],
        "clothing": pa.ClothingType[value("clothing")],
        "clothing_color": value("clothing_color"),
    }
    svg = pa.Avatar(**arguments).render()
    side = 220 / pose.zoom  # the square that is shown: head and shoulders
    box = f'viewBox="{132 - side / 2 + pose.dx:.2f} {140 - side / 2 + pose.dy:.2f} {side:.2f} {side:.2f}"'
    svg = re.sub(
        r'width="264px" height="280px" viewBox="[^"]*"', f'width="{SIZE}" height="{SIZE}" {box}', svg, count=1
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, background=value("background"), skip_system_fonts=True)
    picture = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
    if picture.shape != (SIZE, SIZE, 3):
        raise RuntimeError(f"resvg drew {picture.shape}, expected {(SIZE, SIZE, 3)}: the SVG header has changed")
    return picture[:, ::-1].copy() if pose.mirror else picture


def labels(person: Person) -> np.ndarray:
    """int64 [10]: index of each attribute's value; -1 where the picture does not show it."""
    out = np.array([NAMES[n].index(person[n]) for n in NAMES], dtype=np.int64)
    order = list(NAMES)
    if person["hair"] == "bald" and person["facial_hair"] == "clean shaven":
        out[order.index("hair_color")] = -1
    if person["glasses"] == "sunglasses":
        out[order.index("eyes")] = -1
    return out
