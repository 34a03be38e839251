"""Splits that nothing leaks through, pictures that fit, limits, notes, and the prompts that ship with the package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rwopt.errors import UserError
from rwopt.files import package_folder
from rwopt.models import Model
from rwopt.tasks import make_task
from rwopt.tasks.cases import SPLITS, Case, digest, fit_cases, fit_picture, load_cases, notes


def prompts(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def jsonl(path: Path, *rows: Mapping[str, object]) -> str:
    return prompts(path, *(json.dumps(row) for row in rows))


def by_split(place: str, task: str = "generation") -> dict[str, str]:
    """Id -> split."""
    return {case.id: split for split in SPLITS for case in load_cases(place, split, task)}


def share(key: str) -> float:
    """A second reading of the rule: the first 12 hex digits as a share of 16 ** 12."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) / 16**12


def expected(key: str) -> str:
    return "train" if share(key) < 0.6 else "validation" if share(key) < 0.8 else "test"


LINES = [f"a picture of {i} hats" for i in range(60)]


def refused(place: str, split: str = "train", task: str = "generation", limit: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_cases(place, split, task, limit)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- splits


def test_a_split_is_a_function_of_the_id_alone(tmp_path: Path) -> None:
    found = by_split(jsonl(tmp_path / "a.jsonl", *({"id": f"c{i}", "caption": t} for i, t in enumerate(LINES))))
    assert found == {f"c{i}": expected(f"c{i}") for i in range(60)}
    assert len(set(found.values())) == 3


def test_adding_a_case_moves_none(tmp_path: Path) -> None:
    few = by_split(prompts(tmp_path / "few.txt", *LINES[:40]))
    more = by_split(prompts(tmp_path / "more.txt", "# mine", LINES[50], "", *reversed(LINES[:40]), *LINES[41:50]))
    assert len(few) == 40
    assert len(more) == 50
    assert few.items() <= more.items()


def test_a_split_is_in_the_order_of_its_hashes(tmp_path: Path) -> None:
    place = prompts(tmp_path / "a.txt", *LINES)
    whole = [c.id for c in load_cases(place, "train", "generation")]
    assert whole == sorted(whole, key=share)
    assert [c.id for c in load_cases(place, "train", "generation", 5)] == whole[:5]


def test_one_caption_is_one_identity(tmp_path: Path) -> None:
    """Case and spaces aside, and though the ids alone would part them."""
    rows = [{"id": f"c{i}", "caption": text} for i, text in enumerate(LINES)]
    twins = [{"id": f"twin{i}", "caption": text.upper().replace(" ", "  ")} for i, text in enumerate(LINES)]
    found = by_split(jsonl(tmp_path / "a.jsonl", *rows, *twins))
    assert all(found[f"twin{i}"] == found[f"c{i}"] == expected(f"c{i}") for i in range(60))
    assert any(expected(f"twin{i}") != expected(f"c{i}") for i in range(60))


def test_one_picture_is_one_identity(tmp_path: Path) -> None:
    """As source or as truth, by its bytes and under any name; a caption that pictures share makes them no twins."""
    for i in range(40):
        for name in ("a", "b"):
            Image.new("RGB", (8, 8), (i, 9, 9)).save(tmp_path / f"{name}{i}.png")
    rows = [{"id": f"{name}{i}", "caption": "a hat", "source_image": f"{name}{i}.png"}
            for name in ("a", "b") for i in range(40)]  # fmt: skip
    rows.append({"id": "chain", "caption": "a hat", "source_image": "b3.png", "truth_image": "a4.png"})
    found = by_split(jsonl(tmp_path / "a.jsonl", *rows), "editing")
    assert len(found) == 81
    for i in (i for i in range(40) if i != 4):
        assert found[f"a{i}"] == found[f"b{i}"] == expected(f"a{i}")
    assert found["a4"] == found["b4"] == found["chain"] == found["a3"]  # the chain binds two into one
    assert len(set(found.values())) == 3


def test_splits_may_be_told(tmp_path: Path) -> None:
    told = [*SPLITS, *SPLITS]
    rows = [{"id": f"c{i}", "caption": LINES[i], "split": split} for i, split in enumerate(told)]
    assert by_split(jsonl(tmp_path / "a.jsonl", *rows)) == {f"c{i}": split for i, split in enumerate(told)}
    bad = jsonl(tmp_path / "b.jsonl", *rows, {"id": "x", "caption": LINES[0], "split": "test"})
    assert "b.jsonl line 7: the same picture or caption as " in refused(bad)
    assert "b.jsonl line 7: split is empty" in refused(jsonl(tmp_path / "b.jsonl", *rows, {"caption": "new"}))
    assert "split val is unknown" in refused(jsonl(tmp_path / "b.jsonl", {"caption": "new", "split": "val"}))
    assert "(in all" not in refused(jsonl(tmp_path / "b.jsonl", *rows[:2]))
    assert "too few cases, 2: train 1, validation 1, test 0" in refused(str(tmp_path / "b.jsonl"))


def test_shares_may_be_given(tmp_path: Path) -> None:
    place = prompts(tmp_path / "a.txt", *LINES)
    half = load_cases(place, "test", "generation", shares=(0.25, 0.25, 0.5))
    assert 20 <= len(half) <= 40
    assert all(share(c.id) >= 0.5 for c in half)
    for shares in ([1, 0, 0], [0.5, 0.5], [0.5, 0.5, 0.5]):
        with pytest.raises(UserError, match="give three numbers above 0 that add up to 1"):
            load_cases(place, "test", "generation", shares=shares)


def test_too_few_and_too_many(tmp_path: Path) -> None:
    assert "too few cases, 1: " in refused(prompts(tmp_path / "one.txt", "a hat"))
    place = prompts(tmp_path / "a.txt", *LINES)
    counts = [len(load_cases(place, split, "generation")) for split in SPLITS]
    assert sum(counts) == 60
    said = refused(place, "test", limit=99)
    assert f"test has {counts[2]} generation cases, 99 were asked for" in said
    assert f"(in all train {counts[0]}, validation {counts[1]}, test {counts[2]})" in said
    assert said.endswith(f"set task.test={counts[2]} or give more cases")
    assert "split=tets: did you mean test?" in refused(place, "tets")


def test_the_same_case_twice_is_one_and_two_under_one_id_are_refused(tmp_path: Path) -> None:
    place = prompts(tmp_path / "a.txt", *LINES, LINES[7], LINES[7])
    cases = [c for split in SPLITS for c in load_cases(place, split, "generation")]
    assert len(cases) == 60
    assert notes(cases) == ["1 of 60 cases: given more than once, taken once"]
    rows = [{"id": "a", "caption": "x"}, {"id": "b", "caption": "y"}, {"id": "a", "caption": "z"}]
    said = refused(jsonl(tmp_path / "b.jsonl", *rows))
    assert "b.jsonl line 3: id a is also that of " in said
    assert "b.jsonl line 1: give each its own" in said


# --- pictures


def test_pictures_are_brought_to_size_and_it_is_said_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(30):
        size = (48, 96) if i % 2 else (32, 32)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{i}.png")
    rows = [{"id": str(i), "caption": "a hat", "source_image": f"{i}.png"} for i in range(30)]
    place = jsonl(tmp_path / "a.jsonl", *rows)
    plain = load_cases(place, "train", "editing")
    wide = sum(c.source is not None and c.source.shape == (48, 96, 3) for c in plain)
    assert notes(plain) == []
    cases = load_cases(place, "train", "editing", size=(32, 32))
    assert all(c.source is not None and c.source.shape == (32, 32, 3) for c in cases)
    said = f"{wide} of {len(cases)} cases: source picture cropped to its centre and scaled to 32 x 32"
    assert notes(cases) == notes([*cases, *cases]) == [said]
    padded = load_cases(place, "train", "editing", size=(32, 32), fit="pad")
    assert notes(padded) == [f"{wide} of {len(cases)} cases: source picture scaled with white beside it to 32 x 32"]
    again = fit_cases(plain, (32, 32))
    assert digest(again) == digest(cases) != digest(plain)
    assert digest(padded) != digest(cases)
    assert notes(plain) == []  # the given ones stay
    with pytest.raises(UserError, match=r"task\.fit=stretch: did you mean"):
        load_cases(place, "train", "editing", size=(32, 32), fit="stretch")


def test_an_edit_fits_the_pictures_that_it_is_given(avatars: Model) -> None:
    rng = np.random.default_rng(0)
    wide, big = rng.integers(0, 256, (48, 96, 3), np.uint8), rng.integers(0, 256, (128, 128, 3), np.uint8)
    case = Case("a", "portrait", source=wide, truth=big)
    task: Any = make_task("editing", avatars, [case], 2)
    expected = [fit_picture(picture, (64, 64))[0] for picture in (wide, big)]
    for made, picture in zip((task.references, task.truths), expected, strict=True):
        assert np.array_equal(made[0].permute(1, 2, 0).numpy() * 255, picture)
    assert notes(task.cases) == ["1 of 1 cases: source picture cropped to its centre and scaled to 64 x 64",
                                 "1 of 1 cases: truth picture scaled to 64 x 64"]  # fmt: skip
    assert case.source is wide


def test_generation_reads_no_pictures(tmp_path: Path) -> None:
    rows = [{"caption": text, "source_image": "none.png"} for text in LINES]
    assert all(c.source is None for c in load_cases(jsonl(tmp_path / "a.jsonl", *rows), "train", "generation"))
    assert refused(str(tmp_path / "a.jsonl"), task="editing").endswith("none.png cannot be read: there is no such file")


def test_a_digest_sees_every_part() -> None:
    picture = np.zeros((2, 3, 3), np.uint8)
    cases = [Case("a", "b"), Case("b", "b"), Case("a", "c"), Case("a", "b", "c"), Case("a", "b", source=picture),
             Case("a", "b", truth=picture), Case("a", "b", source=picture.reshape(3, 2, 3)),
             Case("a", "b", source=picture + 1), Case("a", "b", hidden=["x"])]  # fmt: skip
    assert len({digest([case]) for case in cases}) == len(cases)
    assert digest([Case("a", "b", done=["cropped"])]) == digest([Case("a", "b")])


# --- the prompts that ship


def test_shipped_prompts() -> None:
    rows = {}
    for split in SPLITS:
        lines = (package_folder("data") / "prompts" / f"{split}.jsonl").read_text(encoding="ascii").splitlines()
        rows[split] = [json.loads(line) for line in lines]
        cases = load_cases("prompts", split, "generation")
        assert [(c.id, c.caption, c.kind) for c in cases] == [(r["id"], r["caption"], r["kind"]) for r in rows[split]]
        assert {expected(c.id) for c in cases} == {split}
        assert [c.id for c in cases] == sorted((c.id for c in cases), key=share)
        assert len({c.kind for c in cases}) == 6
    every = [row for part in rows.values() for row in part]
    assert len(every) >= 240
    assert [len(rows[split]) for split in SPLITS] == [155, 46, 51]  # what data/README.md says
    assert len({row["id"] for row in every}) == len({row["caption"].lower() for row in every}) == len(every)
    for row in every:
        assert row.keys() == {"id", "caption", "kind"}
        assert 5 <= len(row["caption"].split()) < 50
        assert len(row["caption"]) < 200  # a token is at least one letter, and English ones hold four: far below 77
    kinds = [row["kind"] for row in every]
    assert {kind: kinds.count(kind) for kind in sorted(set(kinds))} == dict.fromkeys(
        ["animation", "concept art", "painting", "people", "photo", "scene"], 42
    )
