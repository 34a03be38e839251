"""What a person may have: each kind of place, told from itself, and one line for each that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rwopt.errors import UserError
from rwopt.tasks.cases import SPLITS, load_cases
from rwopt.tasks.sources import PIE_KINDS, Entry, read_entries


def entries(place: Path, task: str = "generation", instruction: str = "", split: str = "train") -> list[Entry]:
    return read_entries(str(place), split, task, instruction)


def refused(place: Path, task: str = "generation", instruction: str = "") -> str:
    with pytest.raises(UserError) as caught:
        entries(place, task, instruction)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def photo(path: Path, color: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (color, 0, 0)).save(path)
    return path


# --- prompts


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_prompt_a_line(tmp_path: Path, start: str, end: str) -> None:
    text = start + end.join(["a hat", "", "# not this", "  ein Hut für \u2028 Jörg ", "a, b; c", "   "])
    found = entries(write(tmp_path / "Mine.TXT", text))
    assert [e.caption for e in found] == ["a hat", "ein Hut für \u2028 Jörg", "a, b; c"]
    assert [e.where.rpartition(" ")[2] for e in found] == ["1", "4", "5"]
    assert len({e.id for e in found}) == 3
    assert entries(write(tmp_path / "b.txt", "a hat"))[0].id == found[0].id


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no generation cases"),
        (b"# nothing\n\n", "has no generation cases"),
        ("a hat\nH\u00fcte\n".encode("latin-1"), "line 2 is not UTF-8 (byte 0xfc): save it as UTF-8"),
        ("a hat".encode("utf-16"), "is UTF-16, not UTF-8: save it as UTF-8"),
    ],
)
def test_prompts_that_do_not_fit(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in refused(write(tmp_path / "a.txt", content))


def test_prompts_alone_are_no_edits(tmp_path: Path) -> None:
    said = refused(write(tmp_path / "a.txt", "a hat\n"), "editing")
    assert "a.txt line 1: " in said
    assert "has no source picture, which an edit needs: give source_image, or use task.name=generation" in said
    with pytest.raises(UserError, match="has no source picture"):
        load_cases("prompts", "train", "editing", 3)


# --- tables and lines


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_table(tmp_path: Path, mark: str) -> None:
    rows = [["ID", "Caption", "source_image", "kind", "notes"], ["a", f'"a {mark} ""b"""', "x.png", "hat", "-"],
            ["b", '"two\nlines"', "", "", ""]]  # fmt: skip
    found = entries(write(tmp_path / "a.csv", "".join(mark.join(row) + "\r\n" for row in rows)))
    assert [(e.id, e.caption, e.kind) for e in found] == [("a", f'a {mark} "b"', "hat"), ("b", "two\nlines", "")]


def test_tables_and_lines_say_the_same(tmp_path: Path) -> None:
    picture, other = photo(tmp_path / "photos" / "x.png"), photo(tmp_path.parent / f"{tmp_path.name}-y.png")
    rows = [
        {"prompt": "a hat", "source_caption": "a head", "source_image": "photos/x.png", "split": "Test"},
        {"caption": "b", "prompt": "c", "source_image": str(picture), "truth_image": f"../{other.name}"},
    ]
    names = sorted({name for row in rows for name in row})
    table = "\n".join([",".join(names), *(",".join(row.get(name, "") for name in names) for row in rows)])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    one = entries(write(tmp_path / "a.csv", table), "editing")
    two = entries(write(tmp_path / "a.jsonl", lines), "editing")
    for a, b in zip(one, two, strict=True):
        assert {**vars(a), "where": ""} == {**vars(b), "where": ""}
    assert [(e.caption, e.source_caption, e.split) for e in one] == [("a hat", "a head", "test"), ("b", "", "")]
    assert one[0].source == one[1].source == picture  # relative to the file, or absolute
    assert one[1].truth is not None
    assert one[1].truth.samefile(other)


def test_lines_keep_what_is_known_of_attributes(tmp_path: Path) -> None:
    row = {"id": 7, "caption": "a hat", "change": {"hat": "on"}, "hidden": ["hair"], "target": {"hat": "on"}}
    (found,) = entries(write(tmp_path / "a.jsonl", json.dumps(row)))
    assert found.id == "7"
    assert found.about == {name: row[name] for name in ("change", "hidden", "target")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no column caption (it has nothing)"),
        ("a hat\nb\n", "has no column caption (it has a hat)"),
        ("id,caption\na,x\nb,\n", "line 3 is no case (caption is empty): it needs caption"),
        ("id,caption\na,x, y\n", "line 2 has more fields than the first line: put captions with ',' in quotes"),
        ("id,caption\na,\"x\n", "is no CSV"),
        ("id,caption\na,\"x\"y\n", "after line 1 is no CSV"),
        ("caption,split\nx,dev\n", "line 2: split dev is unknown: write train, validation or test"),
        ("caption,id\n", "has no generation cases"),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, text: str, said: str) -> None:
    assert said in refused(write(tmp_path / "a.csv", text))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is no case ("),
        ("[1]", "not a mapping of fields"),
        ("{}", "caption is missing"),
        ('{"caption": " "}', "caption is empty"),
        ('{"caption": 3}', "caption is no text"),
        ('{"caption": "a", "id": true}', "id is no text"),
        ('{"caption": "a", "source_image": ["x"]}', "source_image is no text"),
        ('{"caption": "a", "cell": "1"}', "cell is no whole number"),
        ('{"caption": "a", "hidden": {"a": 1}}', "hidden is no list"),
        ('{"caption": "a", "target": [1]}', "target is no mapping"),
        ("[" * 100_000, "is no case ("),
    ],
)
def test_lines_that_do_not_fit(tmp_path: Path, line: str, said: str) -> None:
    found = refused(write(tmp_path / "a.jsonl", '{"caption": "first"}\n' + line + "\n"))
    assert "a.jsonl line 2 is no case (" in found
    assert said in found


# --- folders


def test_splits_in_files(tmp_path: Path) -> None:
    for split in SPLITS[:2]:
        write(tmp_path / f"{split}.jsonl", json.dumps({"id": split, "caption": f"a {split}"}))
    for split in SPLITS[:2]:
        assert [(e.id, e.split) for e in entries(tmp_path, split=split)] == [(split, split)]
    with pytest.raises(UserError, match=r"test\.jsonl is missing"):
        entries(tmp_path, split="test")
    write(tmp_path / "test.jsonl", '{"id": "a", "caption": "x"}\n' * 2)
    assert len(load_cases(str(tmp_path), "test", "generation")) == 1


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Captions beside pictures, one in a folder below, and what systems leave behind."""
    for i, name in enumerate(["a.png", "b.JPG", "10_hats/c.d.webp"]):
        picture = photo(tmp_path / "album" / name, i)
        write(picture.with_suffix(".txt"), f"head {i},\n with hair \n")
    write(tmp_path / "album" / ".DS_Store", b"\0")
    write(tmp_path / "album" / "__MACOSX" / "._a.png", b"\0")
    return tmp_path / "album"


def test_captions_beside_pictures_are_prompts(album: Path) -> None:
    found = entries(album)
    assert [(e.id, e.caption) for e in found] == [
        ("10_hats/c.d.webp", "head 2, with hair"), ("a.png", "head 0, with hair"), ("b.JPG", "head 1, with hair"),
    ]  # fmt: skip
    assert all(e.source is None for e in found)
    (album / "a.txt").unlink()
    assert f"1 of 3 pictures have no caption of what is wanted: write {album / 'a.txt'}" in refused(album)
    write(album / "a.txt", " \n")
    assert "a.txt is empty: write a caption into it, or remove it" in refused(album)
    write(album / "a.txt", "Hüte".encode("latin-1"))
    assert "a.txt line 1 is not UTF-8 (byte 0xfc)" in refused(album)


def test_wanted_captions_beside_pictures(album: Path) -> None:
    assert "3 of 3 pictures have no caption of what is wanted" in refused(album, "editing")
    for name in ("a.png", "b.JPG", "10_hats/c.d.webp"):
        write((album / name).with_suffix(".edit.txt"), f"{name} with a hat")
    found = entries(album, "editing")
    assert [e.caption for e in found] == [f"{e.id} with a hat" for e in found]
    assert [e.source for e in found] == [album / e.id for e in found]
    assert found[1].source_caption == "head 0, with hair"
    assert "every case of " in refused(album, "editing", "with a scarf")  # an instruction that does nothing


def test_one_instruction_for_all(album: Path) -> None:
    write(album / "a.edit.txt", "a bald head")
    write(album / "instruction.txt", "a head with a hat\n")
    assert [e.caption for e in entries(album, "editing")] == ["a head with a hat", "a bald head", "a head with a hat"]
    found = [e.caption for e in entries(album, "editing", "{caption}, in oil")]
    assert found == ["head 2, with hair, in oil", "a bald head", "head 1, with hair, in oil"]
    (album / "b.txt").unlink()
    assert "the instruction wants a {caption}: write " in refused(album, "editing", "{caption}, in oil")
    assert "generation takes no instruction" in refused(album, "generation", "in oil")
    write(album / "instruction.txt", "")
    assert "instruction.txt is empty" in refused(album, "editing")


def test_an_instruction_for_a_table(tmp_path: Path) -> None:
    place = write(tmp_path / "a.csv", "source_image,source_caption\nx.png,a head\ny.png,a tree\n")
    assert [e.caption for e in entries(place, "editing", "{caption} in snow")] == ["a head in snow", "a tree in snow"]
    assert "no column caption" in refused(place, "editing")
    assert "every case of avatars has a caption of its own" in refused(Path("avatars"), "editing", "in oil")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "it holds nothing"),
        (["a.pdf", "b.pdf", "README"], "it holds 2 .pdf, 1 without an ending"),
        (["metadata.csv", "b.pdf"], "give "),
        (["a.png", "IMG_1.HEIC", "b.heic"], "2 pictures cannot be read ("),
        (["a.svg"], "save them as PNG or JPEG"),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, files: list[str], said: str) -> None:
    for name in files:
        write(tmp_path / "own" / name, "x")
    (tmp_path / "own").mkdir(exist_ok=True)
    found = refused(tmp_path / "own")
    assert found.startswith(f"task.cases={tmp_path / 'own'}: ")
    assert said in found
    assert ("metadata.csv" in found) == ("metadata.csv" in files)


@pytest.mark.parametrize(
    ("name", "said"),
    [("none", "there is no such file or folder"), ("a.xlsx", "a file ending in .xlsx"), ("list", "ending in nothing")],
)
def test_places_that_are_nothing(tmp_path: Path, name: str, said: str) -> None:
    if name != "none":
        write(tmp_path / name, "x")
    found = refused(tmp_path / name)
    assert said in found
    assert all(word in found for word in ("'avatars'", "'prompts'", ".csv", "PIE-Bench"))


# --- PIE-Bench


def pie(folder: Path, **changes: Any) -> Path:
    """Two cases in the layout of the benchmark; `changes` are made to the second."""
    rows: dict[str, Any] = {}
    for number, name in ((0, "0_random_140/000000000000.jpg"), (6, "6_change_attribute_color_40/600000000001.jpg")):
        photo(folder / "annotation_images" / name, number)
        rows[Path(name).stem] = {
            "image_path": name, "original_prompt": "a [red]  hat on a table",
            "editing_prompt": "a [blue] hat on [a] table",
            "editing_instruction": "Change the color of the hat", "editing_type_id": str(number),
            "blended_word": "hat hat", "mask": [0, 262144],
        }  # fmt: skip
    rows["600000000001"] |= changes
    write(folder / "mapping_file.json", json.dumps(rows))
    return folder


def test_pie_bench(tmp_path: Path) -> None:
    found = entries(pie(tmp_path), "editing")
    assert [e.id for e in found] == ["000000000000", "600000000001"]
    assert [e.kind for e in found] == ["random", "color"]
    assert len(PIE_KINDS) == 10
    assert {(e.source_caption, e.caption) for e in found} == {("a red hat on a table", "a blue hat on a table")}
    assert all(e.source is not None and e.source.is_file() for e in found)
    assert [e.caption for e in entries(tmp_path)] == ["a blue hat on a table"] * 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"editing_prompt": None}, "it needs original_prompt, editing_prompt, image_path"),
        ({"editing_prompt": "[]"}, "editing_prompt is empty"),
        ({"image_path": "../../secret.png"}, "image_path ../../secret.png leads out of "),
        ({"image_path": "/etc/passwd"}, "leads out of "),
    ],
)
def test_pie_bench_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    found = refused(pie(tmp_path, **changes), "editing")
    assert "mapping_file.json 600000000001" in found
    assert said in found


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_no_mapping_of_pie_bench(tmp_path: Path, text: str) -> None:
    write(tmp_path / "mapping_file.json", text)
    assert "mapping_file.json is no mapping of PIE-Bench" in refused(tmp_path)


def test_cases_of_each_kind_of_place(album: Path, tmp_path: Path) -> None:
    """Through to pictures and splits."""
    for i in range(20):
        picture = photo(album / f"p{i}.png", 50 + i)
        write(picture.with_suffix(".txt"), f"hat {i}")
    cases = [c for split in SPLITS for c in load_cases(str(album), split, "editing", instruction="{caption} on fire")]
    assert len(cases) == 23
    assert all(c.caption == f"{c.source_caption} on fire" for c in cases)
    shown = {c.id: c.source for c in cases}
    for i in range(20):
        assert np.array_equal(shown[f"p{i}.png"], np.asarray(Image.open(album / f"p{i}.png")))  # type: ignore[arg-type]
