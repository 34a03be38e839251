from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from rich.console import Console

from rwopt.errors import UserError
from rwopt.report import (
    Picture,
    Report,
    image_grid,
    importance_heatmap,
    schedule_heatmap,
    search_history,
    terminal_table,
    write_html,
)
from rwopt.report.data import best, effect, interval, number, paired_with, probability, signed
from rwopt.report.heatmaps import split_site
from rwopt.report.html import flatten
from rwopt.results import ArmMeans, Metric, Paired

SITES = (
    "down_blocks.0.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
)
SIGMAS = np.array([14.6, 3.0, 0.7, 0.1])


@dataclass(frozen=True)
class FakeSchedule:
    sites: tuple[str, ...]
    sigmas: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]


@dataclass(frozen=True)
class FakeImportance:
    sites: tuple[str, ...]
    sigmas: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64] | None = None
    high: npt.NDArray[np.float64] | None = None


def pair(metric: str, b: str, mean: float, low: float, high: float, split: str = "test") -> Paired:
    return Paired(metric, metric == "edit", split, "learned", b, mean, low, high, 0.64, 0.0004, 120, 2)


@pytest.fixture
def report() -> Report:
    return Report(
        title="Learned & plain <weights>",
        recipe="editing",
        task="edit",
        metrics=[
            Metric("edit", True),
            Metric("kept", False, format=".1%"),
            Metric("distance", False, False, ".2f"),
        ],
        arms=[
            ArmMeans("plain", {"edit": 0.412, "kept": 0.79, "distance": 4.0}, 0),
            ArmMeans("analytic", {"edit": 0.43, "kept": 0.8, "distance": 3.5}, 3360, "from the <probe>"),
            ArmMeans("learned", {"edit": 0.4931, "distance": 3.004}, 24000),
        ],
        paired=[
            pair("edit", "analytic", 0.0631, 0.02, 0.1),
            pair("edit", "plain", 0.0811, 0.0411, 0.1211),
            pair("distance", "plain", -0.996, -1.4, -0.5),
            pair("kept", "plain", -0.05, -0.1, 0.0123),
            pair("edit", "plain", 0.2, 0.1, 0.3, split="validation"),
            replace(pair("edit", "plain", 0.0189, 0.01, 0.03), a="analytic"),
        ],
        split="test",
        cases=120,
        settings={"tuner": {"trials": 150, "name": "optuna"}, "seed": 0},
        versions={"rwopt": "0.1.0"},
        command="rwopt search recipe=editing",
        verdict=["Learned beats plain.", "Identity is unclear."],
    )


def test_numbers_read_well() -> None:
    assert number(0.4567, ".3f") == "0.457"
    assert number(-0.4567, ".1f") == "−0.5"
    assert number(float("nan"), ".3f") == number(None, ".3f") == "–"
    assert number(3.0, "d") == "3"
    assert signed(0.081, ".3f") == "+0.081"
    assert signed(-0.081, ".1%") == "−8.1 pp"
    assert signed(-0.0001, ".3f") == "0.000"
    assert [probability(p) for p in (0.0002, 0.0341, 0.41, 1.0)] == ["<0.001", "0.034", "0.41", "1.00"]


def test_best_follows_the_direction_and_shows_ties() -> None:
    arms = [
        ArmMeans("a", {"m": 0.10001}, 0),
        ArmMeans("b", {"m": 0.10002}, 0),
        ArmMeans("c", {"m": 0.2}, 0),
        ArmMeans("d", {}, 0),
    ]
    assert best(arms, Metric("m", True)) == {"c"}
    assert best(arms, Metric("m", True, higher_is_better=False)) == {"a", "b"}
    assert best(arms[-2:], Metric("m", True)) == set()


def test_effect_follows_the_direction_and_needs_an_interval_without_zero() -> None:
    up, down = Metric("m", True), Metric("m", True, higher_is_better=False)
    assert effect(pair("m", "plain", 1, 0.5, 1.5), up) == "better"
    assert effect(pair("m", "plain", 1, 0.5, 1.5), down) == "worse"
    assert effect(pair("m", "plain", -1, -1.5, -0.5), down) == "better"
    assert effect(pair("m", "plain", 1, 0.0, 1.5), up) == "unclear"
    assert effect(pair("m", "plain", 0, float("nan"), float("nan")), up) == "unclear"
    assert interval(pair("m", "plain", 0.05, -0.01, 0.11), replace(up, format=".1%")) == "[−1.0, +11.0]"


def test_pairs_come_in_the_order_of_metric_groups_and_arms(report: Report) -> None:
    found = [(metric.name, [pair.b for pair in pairs]) for metric, pairs in paired_with(report, "learned")]
    assert found == [("edit", ["plain", "analytic"]), ("kept", ["plain"]), ("distance", ["plain"])]
    assert [metric.name for metric, _ in paired_with(report, "learned", ["kept"])] == ["kept"]
    assert paired_with(report, "plain") == []
    assert [pair.mean for _, pairs in paired_with(report, "analytic") for pair in pairs] == [0.0189]


def render(report: Report, width: int = 100, **options: object) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(terminal_table(report, width, **options))  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_terminal_table_shows_every_number_within_the_width(report: Report) -> None:
    text = render(report)
    assert max(map(len, text.splitlines())) <= 100
    row = next(line for line in text.splitlines() if line.startswith("learned "))
    assert row.replace("│", " ").split() == ["learned", "0.493", "–", "3.00", "24,000"]
    for part in (
        "optimised",
        "held out",
        "edit ↑",
        "distance ↓",
        "79.0%",
        "+0.081",
        "[+0.041, +0.121]",
        "64 %",
        "<0.001",
    ):
        assert part in text, part
    assert "−5.0 pp" in text
    assert "· unclear" in text
    assert "analytic: from the <probe>" in text
    assert "+0.200" not in text  # the validation split is not the test split


def test_terminal_table_marks_the_best_value_in_bold(report: Report) -> None:
    segments = list(Console(width=100).render(terminal_table(report)))
    bold = {segment.text.strip() for segment in segments if segment.style and segment.style.bold}
    assert {"0.493", "80.0%", "3.00", "learned"} <= bold
    assert not {"0.412", "79.0%", "4.00", "plain"} & bold


def test_many_metrics_continue_below_instead_of_being_cut(report: Report) -> None:
    metrics = [Metric(f"a long metric name {n}", n < 4) for n in range(12)]
    arms = [ArmMeans("plain", {m.name: 0.001 * n for n, m in enumerate(metrics)}, 0), ArmMeans("learned", {}, 7)]
    text = render(replace(report, metrics=metrics, arms=arms, paired=[]), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"0.{n:03d}" in text for n in range(12))
    assert "…" not in text
    assert text.count("U-Net\n") + text.count("U-Net ") >= 1


def test_terminal_table_can_choose_metrics_and_needs_no_pairs(report: Report) -> None:
    text = render(report, metrics=["distance"])
    assert "−1.00" in text
    assert "+0.081" not in text
    assert "minus each other arm" not in render(replace(report, paired=[]))


def ink(path: Path) -> npt.NDArray[np.uint8]:
    """The picture as [H, W, 3]; asserts that it is a whole PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return np.asarray(image.convert("RGB"))


def test_schedule_heatmap_is_white_at_one_red_above_and_blue_below(tmp_path: Path) -> None:
    weights = np.ones((4, 4))
    weights[:, 1], weights[:, 2] = 1.8, 0.2
    picture = ink(schedule_heatmap(FakeSchedule(SITES, SIGMAS, weights), tmp_path / "deep" / "schedule.png"))
    assert picture.shape[1] == 1200  # 2 + 5 + 1 inches of labels, cells and colour bar at 150 dpi
    cells = picture[:, 300:1050].astype(int).reshape(-1, 3)
    red, blue = np.array([103, 0, 31]), np.array([5, 48, 97])  # ends of the colour map
    assert (abs(cells - red).sum(1) < 10).sum() > 10_000
    assert (abs(cells - blue).sum(1) < 10).sum() > 10_000
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["schedule.png"]


def test_a_plain_schedule_shows_no_colour(tmp_path: Path) -> None:
    picture = ink(schedule_heatmap(FakeSchedule(SITES[:1], SIGMAS[:1], np.ones((1, 1))), tmp_path / "one.png"))
    cells = picture[:, 300:1050].astype(int)
    assert np.ptp(cells, axis=2).max() < 25  # greys and the ink of the labels


def test_more_sites_make_a_taller_picture_and_more_schedules_a_wider_one(tmp_path: Path) -> None:
    few = FakeSchedule(SITES, SIGMAS, np.full((4, 4), 1.1))
    many_sites = tuple(
        f"up_blocks.{i}.attentions.{j}.{kind}" for i in range(3) for j in range(4) for kind in ("self", "ff")
    )
    many = FakeSchedule(many_sites, SIGMAS, np.full((4, 24), 1.1))
    some = FakeSchedule(many_sites[:14], SIGMAS, np.full((4, 14), 1.1))
    one = ink(schedule_heatmap(few, tmp_path / "a.png")).shape
    tall = ink(schedule_heatmap(many, tmp_path / "b.png")).shape
    assert tall[0] - ink(schedule_heatmap(some, tmp_path / "e.png")).shape[0] == 10 * 45  # 10 rows of 0.3 inches
    assert one[0] < tall[0]
    assert ink(schedule_heatmap({"few": few, "again": few}, tmp_path / "c.png")).shape[1] > one[1]
    assert ink(schedule_heatmap({"few": few, "many": many}, tmp_path / "d.png")).shape[0] > one[0]


@pytest.mark.parametrize(
    "scores",
    [
        np.linspace(0.1, 1, 16),
        np.geomspace(1e-5, 1, 16),
        np.linspace(-1, 1, 16),
        np.linspace(1e-5, 9e-5, 16),
        np.zeros(16),
        np.where(np.arange(16) == 3, np.nan, 1.0),
    ],
    ids=["linear", "log", "signed", "tiny", "zero", "hole"],
)
def test_importance_heatmap_takes_any_scores(tmp_path: Path, scores: npt.NDArray[np.float64]) -> None:
    table = scores.reshape(4, 4)
    path = importance_heatmap(FakeImportance(SITES, SIGMAS, table, table - 0.1, table + 0.1), tmp_path / "i.png")
    assert ink(path).std() > 10


def test_site_names_are_readable() -> None:
    assert split_site("down_blocks.1.attentions.0") == ("down 1", "attention 0")
    assert split_site("mid_block.attentions.0.self") == ("mid", "0 self-attention")
    assert split_site("up_blocks.2.resnets.1") == ("up 2", "resnet 1")
    assert split_site("something.else") == ("", "something.else")


@pytest.mark.parametrize("higher", [True, False])
def test_search_history_is_drawn_with_failures_and_starts(tmp_path: Path, higher: bool) -> None:
    values = [0.4, 0.45, None, float("nan"), 0.5, 0.3, -40.0]
    path = search_history(values, tmp_path / "h.png", starts={"plain": 0, "probe": 2}, higher_is_better=higher)
    picture = ink(path)
    assert picture.shape == (600, 1200, 3)
    blue = np.array([0, 114, 178])
    assert (abs(picture.astype(int) - blue).sum(2) < 10).sum() > 500  # the best-so-far line
    for empty in ([], [None], [1.0]):
        assert ink(search_history(empty, tmp_path / "e.png", higher_is_better=higher)).shape == (600, 1200, 3)
    with pytest.raises(ValueError, match="3 positions for 1 values"):
        search_history([1.0], tmp_path / "x.png", x=[1, 2, 3])


def test_image_grid_keeps_every_pixel_and_the_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {name: list(rng.integers(0, 256, (2, 8, 10, 3), dtype=np.uint8)) for name in ("source", "learned")}
    picture = ink(image_grid(columns, tmp_path / "grid.png", ["a", "red hair\nsecond line"], scale=5))
    (left,) = {
        x
        for x in range(picture.shape[1] - 50)
        if (picture[34:74:5, x : x + 50 : 5] == columns["source"][0]).all() and x % 1 == 0
        and (picture[38:74:5, x + 4 : x + 54 : 5] == columns["source"][0]).all()
    }  # fmt: skip
    for column, name in enumerate(("source", "learned")):
        for row in range(2):
            x, y = left + column * 58, 34 + row * 48
            assert (picture[y : y + 40 : 5, x : x + 50 : 5] == columns[name][row]).all()
            assert (picture[y + 4 : y + 40 : 5, x + 4 : x + 50 : 5] == columns[name][row]).all()
    assert (picture[:, : left - 16] < 100).any()  # captions


def test_long_captions_and_headers_are_cut_to_the_picture(tmp_path: Path) -> None:
    black = [np.zeros((16, 16, 3), np.uint8)]
    short = ink(image_grid({"a": black}, tmp_path / "a.png", ["word"], scale=2))
    long = ink(image_grid({"a very long header": black}, tmp_path / "b.png", ["many words " * 40], scale=2))
    assert long.shape[0] == short.shape[0]
    assert long.shape[1] - short.shape[1] <= 210


def test_image_grid_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    good = np.zeros((4, 4, 3), np.uint8)
    for columns in ({}, {"a": []}, {"a": [good], "b": []}):
        with pytest.raises(ValueError, match="one picture per caption"):
            image_grid(columns, tmp_path / "x.png", ["caption"])
    with pytest.raises(ValueError, match="one shape"):
        image_grid({"a": [good], "b": [good[:2]]}, tmp_path / "x.png", ["caption"])
    with pytest.raises(ValueError, match="uint8"):
        image_grid({"a": [good.astype(float)]}, tmp_path / "x.png", ["caption"])


class Page(HTMLParser):
    """Checks that tags nest, and keeps text and references."""

    VOID = ("meta", "img", "line", "circle", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_well_formed_and_refers_only_to_files_beside_it(report: Report, tmp_path: Path) -> None:
    schedule_heatmap(FakeSchedule(SITES, SIGMAS, np.ones((4, 4))), tmp_path / "schedule.png")
    search_history([1.0, 2.0], tmp_path / "history.png")
    (tmp_path / "schedule.json").write_text(json.dumps({}))
    path = write_html(report, tmp_path)
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert set(page.references) == {"schedule.png", "history.png", "schedule.json"}
    assert all((tmp_path / reference).is_file() for reference in page.references)
    for part in (
        "Learned & plain <weights>", "from the <probe>", "0.493", "79.0%", "24,000", "+0.081", "[+0.041, +0.121]",
        "64\N{NARROW NO-BREAK SPACE}%", "<0.001", "▲ better", "· unclear", "rwopt search recipe=editing",
        "tuner.trials", "150", "rwopt 0.1.0", "(validation split)", "analytic minus", "+0.019", "+0.200",
    ):  # fmt: skip
        assert part in page.text, part
    assert page.text.index("Learned beats plain.") < page.text.index("Results") < page.text.index("Settings")


def test_html_shows_the_pictures_that_it_is_given(report: Report, tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "extra.png")
    page = Page(write_html(report, tmp_path, [Picture("extra.png", "An extra", "caption")]).read_text("utf-8"))
    assert page.references == ["extra.png", "extra.png"]
    assert "An extra" in page.text
    with pytest.raises(ValueError, match=r"has no gone\.png"):
        write_html(report, tmp_path, [Picture("gone.png", "Gone")])


def test_a_bare_report_is_still_a_page(tmp_path: Path) -> None:
    bare = Report("bare", "r", "t", [Metric("m", True)], [ArmMeans("plain", {"m": 1.0}, 0)], [], "test", 1)
    page = Page(write_html(bare, tmp_path).read_text("utf-8"))
    assert page.references == []
    assert "1.000" in page.text
    assert "Settings" not in page.text
    assert "1.000" in render(bare)


def test_settings_are_spelled_as_overrides() -> None:
    settings = {"tuner": {"trials": 150, "range": [0.5, 2]}, "empty": {}, "name": "x", "none": None}
    flat = {"tuner.trials": "150", "tuner.range": "[0.5, 2]", "empty": "{}", "name": "x", "none": "null"}
    assert flatten(settings) == flat


def test_importing_the_report_is_light() -> None:
    code = (
        "import sys, rwopt.report, rwopt.results\n"
        "assert not {'torch', 'matplotlib', 'PIL', 'jinja2', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


ENDINGS = [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")]


@pytest.mark.parametrize(("name", "kind"), ENDINGS)
def test_the_ending_says_the_format(tmp_path: Path, name: str, kind: str) -> None:
    picture = np.full((8, 8, 3), 120, np.uint8)
    image_grid({"plain": [picture]}, tmp_path / name, ["a"])
    assert Image.open(tmp_path / name).format == kind


@pytest.mark.parametrize("name", ["a", "a.gif", "a.png.txt"])
def test_another_ending_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="the ending says the format"):
        image_grid({"plain": [np.zeros((8, 8, 3), np.uint8)]}, tmp_path / name, ["a"])
    assert not list(tmp_path.iterdir())
