"""Where cases come from: what a person has (prompts, tables, folders of pictures, PIE-Bench) as a list of entries.

What a place is, is told from the place itself: a file from its ending, a folder from the files in it. Nothing is
decoded here but text; `rwopt.tasks.cases` splits the entries and reads the pictures of those that are wanted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rwopt.embedded import FOLDERS
from rwopt.errors import UserError
from rwopt.files import package_folder
from rwopt.tasks.pictures import READABLE, UNREADABLE

SPLITS = ("train", "validation", "test")
SHIPPED = (*FOLDERS, "prompts")
"""Sets of cases that come with the package: those of the embedded models, and prompts for others."""

WANTED = (
    f"{', '.join(map(repr, SHIPPED))}, a .txt, .csv or .jsonl file, a folder with train.jsonl or pictures, or PIE-Bench"
)

MASK = ".mask"
"""How the name of a mask ends, before .png."""

PIE_KINDS = ("random", "object", "add", "delete", "content", "pose", "color", "material", "background", "style")
"""What the ten numbers of PIE-Bench's editing types mean (Ju et al., 2023, arXiv 2310.01506, section 5)."""


@dataclass(frozen=True)
class Entry:
    """One case before its pictures are read. `where` names it in messages; `split` and `task` are "" where not said.

    mask: a picture, or the runs of `pictures.mask_of_runs`. cell: place in the sheets of its folder. about: the fields
    change, hidden and target, as they were given.
    """

    where: str
    id: str
    caption: str
    source_caption: str = ""
    kind: str = ""
    source: Path | None = None
    truth: Path | None = None
    mask: Path | tuple[int, ...] | None = None
    cell: int | None = None
    split: str = ""
    task: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)


def folder_of(place: str) -> Path:
    """The path of a place: a set that ships with the package, by its name, or a path."""
    return package_folder("data") / place if place in SHIPPED else Path(place)


def read_entries(place: str, split: str, task: str, instruction: str = "") -> list[Entry]:
    """All entries of a place for one task; of a folder with a file for each split those of `split` alone.

    `instruction`: the caption of every edit that has none of its own; `{caption}` in it stands for the source's.
    Raises `UserError` that says what was found and what would do.
    """
    path = folder_of(place)
    if instruction and task != "editing":
        raise UserError(f"task.instruction={instruction}: {task} takes no instruction, it is for task.name=editing")
    if path.is_dir():
        entries = _folder(place, path, split, task, instruction)
    elif not path.exists():
        raise UserError(f"task.cases={place}: there is no such file or folder; give {WANTED}")
    elif path.suffix.lower() == ".txt":
        entries = list(_prompts(path))
    elif path.suffix.lower() in (".csv", ".tsv"):
        entries = list(_table(path, instruction))
    elif path.suffix.lower() == ".jsonl":
        entries = list(_lines(path, instruction))
    else:
        raise UserError(f"task.cases={place}: a file ending in {path.suffix or 'nothing'} is no list of cases; "
                        f"give {WANTED}")  # fmt: skip
    entries = [e for e in entries if e.task in ("", task)]
    if task == "generation":  # has no use for pictures, and what is one caption is one case
        entries = [replace(e, source=None, truth=None, mask=None) for e in entries]
    if not entries:
        raise UserError(f"task.cases={place} has no {task} cases; give {WANTED}")
    for entry in entries:
        if task == "editing" and entry.source is None and entry.cell is None:
            raise UserError(f"{entry.where}: {entry.id} has no source picture, which an edit needs: give source_image, "
                            f"or use task.name=generation")  # fmt: skip
    if instruction and all(e.caption != _instructed(instruction, e.source_caption) for e in entries):
        raise UserError(f"task.instruction={instruction}: every case of {place} has a caption of its own; leave it out")
    return entries


def has_split_files(place: str) -> bool:
    """Whether a place is a folder with a file for each split."""
    return any((folder_of(place) / f"{split}.jsonl").is_file() for split in SPLITS)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; `UserError` names the line that is not."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): give a readable file") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16, not UTF-8: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): save it as UTF-8") from None


# --- files


def _prompts(path: Path) -> Iterator[Entry]:
    """A prompt a line. An id is of the words alone, so that a line may go anywhere in the file."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        caption = line.strip()
        if caption and not caption.startswith("#"):
            yield Entry(f"{path} line {number}", _digest(caption), caption)


def _table(path: Path, instruction: str) -> Iterator[Entry]:
    """Comma, semicolon or tab, whichever is commonest in the header."""
    text = read_text(path)
    header = text.split("\n", 1)[0]
    mark = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    try:
        names = [(name or "").strip().lower() for name in reader.fieldnames or []]
        if not {"caption", "prompt"} & set(names) and not (instruction and "source_image" in names):
            raise UserError(f"{path}: its first line has no column caption (it has {', '.join(names) or 'nothing'}): "
                            "name the columns there")  # fmt: skip
        reader.fieldnames = names
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row:
                raise UserError(f"{where} has more fields than the first line: put captions with {mark!r} in quotes")
            yield _entry(row, where, path.parent, instruction)
    except csv.Error as error:
        where = f"{path} after line {reader.line_num}"
        raise UserError(f'{where} is no CSV ({error}): quote captions as in "a, b"') from None


def _lines(path: Path, instruction: str, named: bool = False, split: str = "") -> Iterator[Entry]:
    """JSON lines. `named`: each must have an id."""
    for number, line in enumerate(read_text(path).rstrip("\n").split("\n"), 1):
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is no case ({error}): it needs {'id and ' if named else ''}caption") from None
        yield _entry(row, where, path.parent, instruction, named, split)


def _entry(
    row: Any, where: str, folder: Path, instruction: str, named: bool = False, split: str = ""
) -> Entry:
    """An entry of named fields. Paths are relative to `folder`; absolute ones and `..` are the reader's own affair."""
    try:
        if not isinstance(row, dict):
            raise ValueError("not a mapping of fields")
        texts = {name: _text(row, name) for name in ("id", "caption", "prompt", "source_caption", "kind", "task",
                                                      "source_image", "truth_image", "mask", "split")}  # fmt: skip
        caption = texts["caption"] or texts["prompt"]
        if not caption and instruction and (texts["source_image"] or "cell" in row):
            caption = _instructed(instruction, texts["source_caption"])
            if not caption:
                raise ValueError("task.instruction wants {caption}, but there is no source_caption")
        if not caption:
            raise ValueError("caption is empty" if {"caption", "prompt"} & row.keys() else "caption is missing")
        if named and not texts["id"]:
            raise ValueError("id is missing")
        cell = row.get("cell")
        if cell is not None and (isinstance(cell, bool) or not isinstance(cell, int)):
            raise ValueError("cell is no whole number")
        about = {name: row[name] for name in ("change", "hidden", "target") if row.get(name)}
        for name, value in about.items():
            if not isinstance(value, list if name == "hidden" else dict):
                raise ValueError(f"{name} is no {'list' if name == 'hidden' else 'mapping'}")
    except ValueError as error:
        raise UserError(f"{where} is no case ({error}): it needs {'id and ' if named else ''}caption") from None
    named_split = split or texts["split"].lower()
    if named_split and named_split not in SPLITS:
        raise UserError(f"{where}: split {named_split} is unknown: write train, validation or test")
    source, truth, mask = (
        folder / texts[name] if texts[name] else None for name in ("source_image", "truth_image", "mask")
    )
    key = texts["id"] or _digest(caption, texts["source_caption"], texts["source_image"])
    return Entry(where, key, caption, texts["source_caption"], texts["kind"], source, truth, mask, cell,
                 named_split, texts["task"], about)  # fmt: skip


def _text(row: Mapping[str, Any], name: str) -> str:
    """A field that is text, "" if it is not there. Numbers may be ids."""
    value = row.get(name)
    if name == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is no text")
    return (value or "").strip()


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _instructed(instruction: str, source_caption: str) -> str:
    """The instruction for one picture; "" if it needs a source caption that is not there."""
    if "{caption}" in instruction and not source_caption:
        return ""
    return instruction.replace("{caption}", source_caption).strip()


# --- folders


def _folder(place: str, path: Path, split: str, task: str, instruction: str) -> list[Entry]:
    """A folder is, in this order: files of splits, PIE-Bench, pictures."""
    if has_split_files(place):
        file = path / f"{split}.jsonl"
        if not file.exists():
            raise UserError(f"task.cases={place}: {file} is missing; a set of cases has train, validation and test")
        return list(_lines(file, instruction, named=True, split=split))
    if (path / "mapping_file.json").is_file():
        return list(_pie_bench(path))
    files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
    foreign = [p for p in files if p.suffix.lower() in UNREADABLE]
    if foreign:
        raise UserError(f"task.cases={place}: {len(foreign)} pictures cannot be read ({foreign[0]}): save them as PNG "
                        "or JPEG, or take them out")  # fmt: skip
    pictures = [p for p in files if p.suffix.lower() in READABLE]
    if not pictures:
        counts = Counter(p.suffix.lower() or "without an ending" for p in files)
        found = ", ".join(f"{n} {suffix}" for suffix, n in counts.most_common(4)) or "nothing"
        lists = [p.name for p in files if p.parent == path and p.suffix.lower() in (".csv", ".jsonl", ".txt")]
        hint = f"{path / lists[0]}" if lists else WANTED
        raise UserError(f"task.cases={place}: no pictures are in it and {path / 'train.jsonl'} is missing "
                        f"(it holds {found}); give {hint}")  # fmt: skip
    return _pictures(path, pictures, task, instruction)


def _hidden(path: Path) -> bool:
    """Files that a system keeps for itself (.DS_Store, __MACOSX)."""
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _pictures(folder: Path, pictures: list[Path], task: str, instruction: str) -> list[Entry]:
    """Pictures with captions, and masks where they have any, in files beside them. For generation the captions alone
    matter."""
    masks = {p for p in pictures if p.stem.endswith(MASK)}
    pictures = [p for p in pictures if p not in masks]
    alone = masks - {p.with_suffix(f"{MASK}.png") for p in pictures}
    if alone and task == "editing":
        first = min(alone)
        raise UserError(f"{first} is the mask of no picture: name it a{MASK}.png for a.png or a.jpg, or take it out")
    given = folder / "instruction.txt"
    if task == "editing" and not instruction and given.is_file():
        instruction = read_text(given).strip()
        if not instruction:
            raise UserError(f"{given} is empty: write the caption of the pictures wanted into it")
    entries: list[Entry] = []
    lacking: list[Entry] = []
    for picture in pictures:
        name = picture.relative_to(folder).as_posix()
        about = _beside(picture, ".txt")
        if task == "editing":
            caption = _beside(picture, ".edit.txt") or _instructed(instruction, about)
            mask = picture.with_suffix(f"{MASK}.png")
            entry = Entry(str(folder), name, caption, about, source=picture, mask=mask if mask in masks else None)
        else:
            caption = about
            entry = Entry(str(folder), name, caption)
        (entries if caption else lacking).append(entry)
    if lacking:
        first = folder / lacking[0].id
        if task == "editing" and "{caption}" in instruction:
            remedy = f"the instruction wants a {{caption}}: write {first.with_suffix('.txt')}"
        elif task == "editing":
            remedy = f"write {first.with_suffix('.edit.txt')}, an instruction.txt, or task.instruction=..."
        else:
            remedy = f"write {first.with_suffix('.txt')}"
        raise UserError(f"{len(lacking)} of {len(pictures)} pictures have no caption of what is wanted: {remedy}")
    return entries


def _beside(picture: Path, ending: str) -> str:
    """The text file of a picture, as one line; "" if there is none. `UserError` if it is there and empty."""
    path = picture.with_suffix(ending)
    if not path.is_file():
        return ""
    text = " ".join(read_text(path).split())
    if not text:
        raise UserError(f"{path} is empty: write a caption into it, or remove it")
    return text


def _pie_bench(folder: Path) -> Iterator[Entry]:
    """The layout of PIE-Bench: `mapping_file.json` of {id: fields}, pictures in `annotation_images`.

    Brackets around changed words are taken off. Instructions and blended words are not used. Masks are taken as they
    are: the border of one pixel that its authors' evaluation adds is not part of them.
    """
    file, pictures = folder / "mapping_file.json", folder / "annotation_images"
    try:
        mapping = json.loads(read_text(file))
    except (ValueError, RecursionError):
        mapping = None
    if not isinstance(mapping, dict):
        raise UserError(f"{file} is no mapping of PIE-Bench: take the file as it was published")
    for key, row in mapping.items():
        where = f"{file} {key}"
        wanted = ("original_prompt", "editing_prompt", "image_path")
        if not isinstance(row, dict) or any(not isinstance(row.get(name), str) for name in wanted):
            raise UserError(f"{where} is no case of PIE-Bench: it needs {', '.join(wanted)}")
        before, after, image = (row[name] for name in wanted)
        before, after = (" ".join(text.replace("[", "").replace("]", "").split()) for text in (before, after))
        if not after:
            raise UserError(f"{where}: editing_prompt is empty: write one, or take the case out")
        picture = pictures / image
        if not picture.resolve().is_relative_to(pictures.resolve()):
            raise UserError(f"{where}: image_path {image} leads out of {pictures}: mend the path")
        number = str(row.get("editing_type_id", ""))
        kind = PIE_KINDS[int(number)] if number in {str(n) for n in range(len(PIE_KINDS))} else ""
        runs = row.get("mask")
        if runs is not None and not isinstance(runs, list):
            raise UserError(f"{where} has a mask that is no list of runs: take the file as it was published")
        yield Entry(where, key, after, before, kind, picture, mask=None if runs is None else tuple(runs))
