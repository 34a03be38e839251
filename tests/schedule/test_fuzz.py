"""Files of any content: each gives a schedule that can be saved and looked up, or one `UserError` of one line.

Small mutations of good files, by seed: of bytes, structure, numbers, encodings and sizes; and odd paths. A usual run
makes 800. `RWOPT_FUZZ=100000` makes that many, holds each to the limits of a quiet machine and prints what became of
them (`pytest -s`).
"""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwopt.errors import UserError
from rwopt.export import reader
from rwopt.schedule import Schedule
from rwopt.schedule.document import LIMIT
from rwopt.schedule.steps import Steps

COUNT = int(os.environ.get("RWOPT_FUZZ", "800"))
PARTS = 8  # as many tests, so that a failure says where it is
FILES = Path(__file__).parent / "files"
LONGEST = 500
SECONDS = 1.0 if "RWOPT_FUZZ" in os.environ else 2.0  # shared cores take longer, in processor time too
MEGABYTES = 200


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """What earlier tests left is not to be looked through again and again on the files' account."""
    gc.collect()
    gc.freeze()


def base_documents() -> list[dict[str, Any]]:
    sites = ("down_blocks.0.attentions.0", "mid_block.attentions.0.cross", "up_blocks.1.resnets.0.skip")
    sd = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    full = Schedule(
        sites,
        np.array([14.6, 1.6, 0.03]),
        np.array([[1.2, 1, 0.5], [0.9, 0, 2], [1, 1, -1]]),
        interp="previous",
        cfg_branch="cond",
        model={"family": "sd15", "layers_per_block": 2},
        noise=sd,
        calibrated={"timesteps": [1, 2, 3], "guidance_scale": 7.5},
        provenance={"note": "é", "deep": {"a": [1, [2.5, None], []]}},
        extra={"x-mine": True},
        steps=Steps("dpmpp_2m", (14, 3, 0.5), (13, 3, 0.4), (7, 5, 2)),
    )
    table = Schedule(sites[:1], [1.0], [[1.5]], "output", noise={"train_sigma": [0.03, 1, 15]})  # type: ignore[arg-type]
    return [full.to_dict(), table.to_dict(), *(json.loads(path.read_text()) for path in sorted(FILES.glob("*.json")))]


BASES = base_documents()

NUMBERS: list[Any] = [
    0, -0.0, 1, -1, 2, 1.0000001, 1e-7, 5e-324, 1e-310, 1e29, 1e30, 1e300, 1.7e308, 10**9, 10**18, 2**63, 10**400,
    -(10**400), float("nan"), float("inf"), float("-inf"), True, False, 0.99999999, 1000.0, 65536, 1e39,
]  # fmt: skip
TEXTS = [
    "", "1", "12", "nan", "\ud800", "a\nb", "\x00", "../../etc/passwd", "/dev/zero", "file:///etc/passwd", "{{7*7}}",
    "mid_block.attentions.0\n", "up_blocks." + "9" * 5000 + ".attentions.0", "up_blocks.-1.attentions.0", "x" * 2000,
    "mid_block.attentions.٣", "down_blocks.0.attentions.0.__class__", "1.0\n", "2.0", "1." + "0" * 300, "é" * 300,
    "linear", "output", "edm", "flow", "index", "squaredcos_cap_v2", "💡", "\u202e", "rwopt.schedule", "\x1b[31m",
]  # fmt: skip
NAMES = ["x-\nname", "weights", "sigma", "__class__", "told", "x-" + "k" * 3000, "\ud800", "unknown\nentry", "",
         "timestep", "train_sigma", "zero_snr", "num_train_timesteps", "guidance"]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a document, but deep in it."""
    if len(path) > 20:
        return []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in inner for found in places(part, (*path, key)))]


def nested(draw: random.Random) -> Any:
    value: Any = 1
    for _ in range(draw.choice([3, 80, 120, 200])):
        value = [value] if draw.random() < 0.5 else {"x-a": value}
    return value


def new_value(draw: random.Random, old: Any, document: Any) -> Any:
    kind = draw.randrange(9)
    if kind <= 2:
        return draw.choice(NUMBERS)
    if kind == 3:
        return draw.choice(TEXTS)
    if kind == 4:
        return draw.choice([None, [], {}, [[]], [None], {"id": "a"}, [[1.0], 1.0], "12"])
    if kind == 5:
        return nested(draw)
    if kind == 6 and isinstance(old, list) and old:
        return old * draw.choice([2, 50, 3000 // len(old) + 1])
    if kind == 7 and isinstance(old, int | float) and abs(old) < 1e300:
        return old * draw.choice([-1, 1e-9, 1 + 1e-9, 1e9, 1e290])
    path = draw.choice(places(document))
    for key in path:
        document = document[key]
    return copy.deepcopy(document)


def mutate_structure(draw: random.Random) -> bytes:
    document = copy.deepcopy(draw.choice(BASES))
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        paths = places(document)
        path = draw.choice(paths[1:] or paths)
        if not path:
            continue
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        key = path[-1]
        action = draw.randrange(6)
        if not parent:
            continue
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif action == 1:
            parent[draw.choice(NAMES)] = new_value(draw, parent[key], document)
        elif action == 2 and isinstance(parent, dict):
            parent[draw.choice([*NAMES, key + " "])] = parent.pop(key)
        elif action == 2:
            draw.shuffle(parent)
        else:
            parent[key] = new_value(draw, parent[key], document)
    return json.dumps(document, ensure_ascii=draw.random() < 0.9).encode("utf-8", "surrogatepass")


def mutate_bytes(draw: random.Random) -> bytes:
    content = bytearray(json.dumps(draw.choice(BASES)).encode())
    for _ in range(draw.choice([1, 1, 2, 8])):
        if not content:
            break
        at = draw.randrange(len(content))
        action = draw.randrange(5)
        if action == 0:
            content[at] = draw.randrange(256)
        elif action == 1:
            del content[at : at + draw.choice([1, 2, 20])]
        elif action == 2:
            content[at:at] = draw.choice([b"[", b"]", b"{", b'"', b",", b"9", b"9" * 5000, b"-", b"e9", b"\\", b"NaN"])
        elif action == 3:
            content = content[:at]
        else:
            start = draw.randrange(len(content))
            content[at:at] = content[start : start + draw.choice([3, 30])]
    return bytes(content)


def mutate_encoding(draw: random.Random) -> bytes:
    text = json.dumps(draw.choice(BASES))
    kind = draw.randrange(5)
    if kind == 0:
        return text.encode(draw.choice(["utf-16", "utf-32", "utf-8-sig", "utf-16-be"]))
    if kind == 1:
        twice = draw.choice(['"mode"', '"op": {}, "op"', '"\\u006fp": {"mode": "output"}, "op"'])
        return text.replace('"op"', twice).encode()
    if kind == 2:
        return (text + draw.choice(["}", " ", "\n\n", "//", "\x00", text])).encode()
    if kind == 3:
        return draw.choice([b"", b"null", b"[]", b"\xff\xfe", b"{}", b"1e999", b'"a"', b"true", b"-", b"Infinity"])
    number = draw.choice(["1e999", "NaN", "1_0", "0x1", "01", "1."])
    return text.replace(draw.choice(["1.0", "0.0", "1000", "3"]), number).encode()


def mutate_size(draw: random.Random) -> bytes:
    """Tables about as large as they may be, and larger."""
    document = copy.deepcopy(BASES[1])
    sites, levels = draw.choice([(1, 9_999), (1, 10_001), (1999, 90), (2001, 2), (600, 600), (40, 3000), (300, 1)])
    weight = draw.choice([1, 0.5, 1.23456, -1e29, "1", None])
    document["sites"] = [{"id": f"up_blocks.{i}.attentions.{i % 7}"} for i in range(sites + draw.choice([0, 0, 1]))]
    document["grid"] = {"sigma": [levels + 1 - k for k in range(levels + draw.choice([0, 0, -1]))]}
    document["weights"] = [[weight] * sites] * levels
    return json.dumps(document, separators=(",", ":")).encode()


KINDS = {mutate_structure: 600, mutate_bytes: 200, mutate_encoding: 200, mutate_size: 2}  # large ones take a second


def kind_and_content(seed: int) -> tuple[str, bytes]:
    draw = random.Random(seed)
    (kind,) = draw.choices([*KINDS], [*KINDS.values()])
    return kind.__name__.removeprefix("mutate_"), kind(draw)


def calm(function: Callable[[], Any], more: int = 0, printable: bool = True) -> Any:
    """What it gives, None if it refuses; fails unless it does so in time, in one line (and `more` characters).

    printable: whether all of it is for a terminal; a path is the user's own, and is shown as it is.
    """
    began, message = time.process_time(), ""  # of this process: the machine may be busy
    try:
        result = function()
    except (UserError, ValueError) as error:
        assert type(error) in (UserError, ValueError, json.JSONDecodeError, UnicodeDecodeError)  # noqa: PT017
        result, message = None, str(error)
    assert time.process_time() - began < SECONDS
    assert message.isprintable() or not printable
    assert "\n" not in message
    assert len(message) < LONGEST + more
    return result


def accepted(content: bytes, path: Path) -> bool:
    """Whether it is a schedule; fails unless it is sound, or refused as it should be."""
    path.write_bytes(content)
    schedule = calm(lambda: Schedule.load(path), len(str(path)))
    if schedule is None:
        return False
    assert np.isfinite(schedule.at(np.array([np.inf, 14.0, 1.0, 0.5, 0.0]))).all()
    again = Schedule.load(schedule.save(path.with_name("again.json")))
    assert (again, again.digest()) == (schedule, schedule.digest())
    table = reader.load(path)
    assert table.sites == list(schedule.sites)
    np.testing.assert_allclose(table.at(1.0), schedule.at(1.0), rtol=1e-9)
    return True


def check_memory(before: int) -> None:
    """`before`: the most kilobytes that this process had so far."""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024


def check_reader(content: bytes) -> None:
    """The standalone reader is as calm, if less strict."""
    table = calm(lambda: reader.parse(content))
    if table is not None:
        assert np.isfinite(table.at(1.0)).all()
        table.dials(1.0)


@pytest.mark.parametrize("part", range(PARTS))
def test_mutated_files_are_schedules_or_refused_in_one_line(tmp_path: Path, part: int) -> None:
    counts: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(part, COUNT, PARTS):
            kind, content = kind_and_content(seed)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                counts[f"{kind} {'taken' if accepted(content, tmp_path / 'file.json') else 'refused'}"] += 1
                check_reader(content)
                check_memory(before)
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
    print(f"part {part}: {dict(sorted(counts.items()))}")
    good = sum(count for name, count in counts.items() if name.endswith("taken"))
    assert 0.03 * COUNT / PARTS < good < 0.9 * COUNT / PARTS, "the mutations are too wild or too tame"


PIECES = ["..", ".", "", "a" * 300, "~", "é", "\udcff", "%2e%2e", "$HOME", "*", "C:", "file.json", "file.json/x",
          "nul\x00", "dev", "proc", "self", "mem", "\u202e", "-", "folder", "loop", "linked.json",
          "x" * 4000]  # fmt: skip


def odd_path(draw: random.Random, folder: Path) -> str:
    pieces = "/".join(draw.choices(PIECES, k=draw.choice([1, 1, 2, 4, 40])))
    return pieces if draw.random() < 0.2 else f"{folder}/{pieces}"


def test_odd_paths_are_a_file_or_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.json").write_text(json.dumps(BASES[0]))
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "linked.json").symlink_to("file.json")
    good = Schedule.load(tmp_path / "file.json")
    taken = 0
    for seed in range(max(100, COUNT // 20)):
        name = odd_path(random.Random(seed), tmp_path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            read = calm(lambda name=name: Schedule.load(name), len(name) + len(str(tmp_path)), printable=False)
            assert read in (None, good)
            taken += read is not None
            check_memory(before)
        except BaseException as error:
            error.add_note(f"seed {seed}: {name[:200]!r}")
            raise
    for name in ("/dev/null", "/dev/zero", "/proc/self/cmdline", str(tmp_path)):
        assert calm(lambda name=name: Schedule.load(name)) is None
    assert taken
    print(f"paths: {taken} taken")


def document(**changes: Any) -> str:
    return json.dumps({**BASES[1], **changes})


def filled(text: str, end: str = "") -> str:
    return text * ((LIMIT - 2000) // len(text)) + end


HUGE: dict[str, Callable[[], str]] = {
    "too long": lambda: document() + " " * LIMIT,
    "brackets": lambda: "[" * 50_000,
    "deep": lambda: "[" * 50_000 + "]" * 50_000,
    "deep note": lambda: document()[:-1] + ', "x-a": ' + "[" * 900 + "]" * 900 + "}",
    "empty lists": lambda: document()[:-1] + ', "x-a": [' + filled("[],", "[]]}"),
    "empty objects": lambda: document()[:-1] + ', "x-a": [' + filled("{},", "{}]}"),
    "empty rows": lambda: document()[:-1].replace('"weights"', '"x-b"') + ', "weights": [' + filled("[],", "[]]}"),
    "long row": lambda: document()[:-1].replace('"weights"', '"x-b"') + ', "weights": [[' + filled("1,", "1]]}"),
    "fractions": lambda: document()[:-1].replace('"weights"', '"x-b"') + ', "weights": [[' + filled("1.5,", "1]]}"),
    "sites": lambda: document(sites=[{"id": f"up_blocks.{i}.attentions.0"} for i in range(50_000)]),
    "numbers as sites": lambda: document(sites=[0] * 600_000),
    "levels": lambda: document(grid={"sigma": [1] * 600_000}),
    "timesteps": lambda: document(grid={"sigma": [1], "train_timestep": [1] * 600_000}),
    "train sigma": lambda: document(noise={"train_sigma": [1 + i for i in range(100_000)]}),
    "wrong train sigma": lambda: document(noise={"train_sigma": ["a"] * 300_000}),
    "steps": lambda: document(steps={"sampler": "ddim", "sigmas": [1], "told": [1] * 600_000}),
    "training steps": lambda: document(noise={"beta_schedule": "linear", "num_train_timesteps": 10**9}),
    "unknown entries": lambda: "{" + '"format": "rwopt.schedule", "version": "1.0"' + "".join(
        f', "a{i}": 0' for i in range(125_000)) + "}",
    "entries twice": lambda: "{" + "".join(f'"a{i % 60_000}": 0, ' for i in range(120_000)) + '"z": 0}',
    "one word": lambda: document(sites="a" * 1_900_000),
    "a number": lambda: document(weights=[[int("9" * 4000)]]),
    "longer number": lambda: document()[:-1] + ', "x-a": ' + "9" * 1_500_000 + "}",
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_large_files_take_little_time_and_memory(tmp_path: Path, name: str) -> None:
    content = HUGE[name]().encode()
    path = tmp_path / "file.json"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    schedule = calm(lambda: Schedule.load(path), len(str(path)))
    assert schedule is None or np.isfinite(schedule.at(1.0)).all()
    check_reader(content)
    check_memory(before)


def test_what_rounding_would_lose_is_kept(tmp_path: Path) -> None:
    steps = Steps("ddim", (2.0000001, 2, 1), guidance=(1.0000001, 2, 3))
    schedule = Schedule.constant(["mid_block.attentions.0"], [2.0], steps=steps)
    assert Schedule.load(schedule.save(tmp_path / "a.json")).steps == steps


@pytest.mark.parametrize("name", ["sigmas", "told", "guidance"])
@pytest.mark.parametrize("value", ["32", b"32", ("3", "2"), (True, False), (10**400, 2)])
def test_steps_take_numbers_only(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"steps.{name} is .*: give a list of numbers"):
        Steps(**{"sampler": "ddim", "sigmas": (3.0, 2.0), name: value})


def test_a_schedule_too_large_for_a_file_is_not_written(tmp_path: Path) -> None:
    sites = [f"up_blocks.{i}.attentions.0" for i in range(1000)]
    schedule = Schedule.constant(sites, np.linspace(2, 1, 250), 1.23456)
    with pytest.raises(UserError, match="would be longer than 2 MB"):
        schedule.save(tmp_path / "a.json")
    assert not [*tmp_path.iterdir()]
