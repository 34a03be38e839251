"""The emoji world: which pictures there are, what is said of each, and which combinations are kept for testing.

Three styles draw the same code points: Fluent Emoji in 3D (npm `@lobehub/fluent-emoji-3d`, MIT), Fluent Emoji flat
(`@iconify-json/fluent-emoji-flat`, MIT) and Noto Emoji (`@iconify-json/noto`, Apache-2.0). A `Look` is what a caption
tells of one drawing: style, subject, skin, and where they apply gender and hair; the background colour is put behind
the drawing's transparency. Names are those of Unicode's CLDR, from the package `emoji`.

People and gestures alone, all that has a skin tone: there true edits exist. Drawings with two skin tones are left out.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

STYLES = ("3d", "flat", "noto")
SKINS = ("yellow", "light", "medium-light", "medium", "medium-dark", "dark")
GENDERS = ("person", "man", "woman")
HAIRS = ("plain hair", "red hair", "curly hair", "white hair", "bald")
BACKGROUNDS = {"sky": "#9BD3F5", "violet": "#A98BEA", "mint": "#9FE5C5", "peach": "#FFC39B",
               "gray": "#8A8F98", "navy": "#27355E"}  # fmt: skip
TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
HAIR_SIGNS = {"1f9b0": "red hair", "1f9b1": "curly hair", "1f9b3": "white hair", "1f9b2": "bald"}
ADULTS = {"1f9d1": "person", "1f468": "man", "1f469": "woman"}
GENDER_SIGNS = {"2642": "man", "2640": "woman"}
DOING = re.compile(r"(in|with|wearing|getting|feeding|playing|gesturing|tipping|raising|lifting) "
                   r"|\w+ing$|.*hair$|beard$")  # fmt: skip
KINDS = ("skin", "gender", "hair", "occupation", "style", "background")
Points = tuple[str, ...]
Parts = tuple[Points, str | None, str | None, str | None]
ATTRIBUTE = {kind: "subject" if kind == "occupation" else kind for kind in KINDS}


@dataclass(frozen=True, order=True)
class Look:
    """What a caption tells of one drawing, but for the background. None: does not apply (no skin, one gender, ...)."""

    style: str
    subject: str
    skin: str | None = None
    gender: str | None = None
    hair: str | None = None

    @property
    def job(self) -> bool:
        """Whether the subject is something that people do, so that another may take its place."""
        return self.gender is not None and self.skin is not None and self.hair is None


def caption(look: Look, background: str, keep: set[str] | None = None) -> str:
    """The caption in plain words; only what `keep` names is told besides the subject (default all)."""

    def said(name: str) -> bool:
        return keep is None or name in keep

    parts = [f"{look.style} emoji" if said("style") else "emoji"]
    who = look.gender if said("gender") else look.gender and "person"
    if look.subject == "person":
        parts.append(who or "person")
    elif who in ("man", "woman") or (who and DOING.match(look.subject)):  # "man swimming", "person swimming", "singer"
        parts.append(f"{who} {look.subject}")
    else:
        parts.append(look.subject)
    if look.hair and said("hair"):
        parts.append(look.hair)
    if look.skin and said("skin"):
        parts.append(f"{look.skin} skin")
    if said("background"):
        parts.append(f"{background} background")
    return ", ".join(parts)


def target(look: Look, background: str) -> dict[str, str]:
    """Every attribute and its value; what does not apply has the first value and is named by `hidden`."""
    return {
        "style": look.style, "subject": look.subject, "skin": look.skin or SKINS[0],
        "gender": look.gender or GENDERS[0], "hair": look.hair or HAIRS[0], "background": background,
    }  # fmt: skip


def hidden(look: Look) -> list[str]:
    """The attributes that do not apply to this drawing."""
    return [name for name in ("skin", "gender", "hair") if getattr(look, name) is None]


def plain(points: str) -> Points:
    """Code points "1f468-200d-1f9b0" as a tuple, without joiners and variation selectors."""
    return tuple(p for p in points.split("-") if p not in ("fe0f", "200d"))


def names() -> dict[Points, str]:
    """CLDR's English names by code points."""
    import emoji

    out: dict[Points, str] = {}
    for sign, about in sorted(emoji.EMOJI_DATA.items(), key=lambda item: item[1]["status"]):
        key = plain("-".join(f"{ord(c):04x}" for c in sign))
        out.setdefault(key, about["en"].strip(":").replace("_", " "))
    return out


def part(points: Points) -> Parts | None:
    """(key of the subject, skin, gender, hair) of code points; None for two skin tones. The key is the drawing without
    skin, gender and hair."""
    tones = [p for p in points if p in TONES]
    if len(tones) > 1:
        return None
    skin = SKINS[TONES.index(tones[0]) + 1] if tones else None
    rest = [p for p in points if p not in TONES]
    hair = next((HAIR_SIGNS[p] for p in rest if p in HAIR_SIGNS), None)
    rest = [p for p in rest if p not in HAIR_SIGNS]
    gender = next((GENDER_SIGNS[p] for p in rest if p in GENDER_SIGNS), None)
    rest = [p for p in rest if p not in GENDER_SIGNS]
    if gender is None and rest and rest[0] in ADULTS and sum(p in ADULTS for p in rest) == 1:
        gender, rest[0] = ADULTS[rest[0]], "1f9d1"
    return tuple(rest), skin, gender, hair


def looks(points: Iterable[Points]) -> dict[Points, Look]:
    """The look (in style "3d") of each drawing's code points, of those that have a skin tone, yellow included."""
    named, parts = names(), dict[Points, Parts]()
    groups: defaultdict[Points, list[Points]] = defaultdict(list)
    for key in sorted(points):
        found = part(key)
        if found is None or key not in named:
            continue
        parts[key] = found
        groups[found[0]].append(key)
    out = {}
    for root, members in groups.items():
        genders = {parts[m][2] for m in members}
        if not any(parts[m][1] for m in members):
            continue
        subject = _subject(root, members, named, parts)
        for key in members:
            _, skin, gender, hair = parts[key]
            look = Look("3d", subject, skin or SKINS[0])
            if len(genders) > 1:
                look = replace(look, gender=gender or "person")
            if subject == "person":
                look = replace(look, hair=hair or HAIRS[0])
            out[key] = look
    return out


def _subject(root: Points, members: list[Points], named: dict[Points, str], parts: dict[Points, Parts]) -> str:
    """The name of a group of drawings: that of its drawing without skin, gender and hair."""
    plainest = min(members, key=lambda m: (parts[m][1] is not None, parts[m][3] is not None, len(m), m))
    name = named.get(root, named[plainest])
    name = re.sub(r" ?(light|medium-light|medium|medium-dark|dark) skin tone", "", name)
    if len({parts[m][2] for m in members}) > 1:
        name = re.sub(r"^(person|man|woman|men|women|people) (?=\w)", "", name)
    return re.sub(r"[^a-z0-9 -]", "", name.lower()).strip()


def share(*words: str) -> float:
    """A number in [0, 1) that belongs to these words: the same in every run."""
    return int.from_bytes(hashlib.sha256("|".join(words).encode()).digest()[:6], "big") / 2**48


def split_of(look: Look) -> str:
    """"train" (what the networks see), "tuning" (train cases of a search), "validation" or "test": by combination."""
    words = [str(v) for v in (look.style, look.subject, look.skin, look.gender, look.hair)]
    place = share("split", *words)
    bounds = {"test": 0.07, "validation": 0.105, "tuning": 0.14}
    return next((name for name, bound in bounds.items() if place < bound), "train")
