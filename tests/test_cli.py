"""The command line as a stranger meets it: help, mistakes, and every verb once on the embedded model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import SETTINGS, save_tiny_pipeline
from PIL import Image

from rwopt import config
from rwopt.schedule import Schedule
from rwopt.tasks.cases import load_cases

HEAVY = ("torch", "diffusers", "transformers", "optuna", "matplotlib", "wandb", "lightning", "omegaconf")
VERBS = {
    "search": ["key=value", "recipe=NAME", "resume=", "--out", "--print"],
    "probe": ["key=value", "recipe=NAME", "--out"],
    "compare": ["schedule.json", "--recipe", "--set", "--split"],
    "sample": ["--caption", "--schedule", "--model", "--steps", "--guidance", "--seed", "--out"],
    "edit": ["--image", "--caption", "--case", "--split", "--strength", "--schedule", "--steps", "--seed", "--out"],
    "show": ["schedule.json", "other.json", "--png"],
    "sites": ["model"],
    "recipes": [],
    "objectives": ["NAME"],
    "cost": ["model", "--size", "--batch", "--no-guidance", "--dtype", "--device", "--rounds", "--out"],
}
SMALL = [item for item in SETTINGS if item.startswith("task.")]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def schedule_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A schedule of the embedded model whose weights are far from one."""
    sites = ("mid_block.attentions.0.cross", "up_blocks.0.attentions.0.ff")
    weights = np.array([[0.5, 1.5], [1.25, 0.1234567]])
    about = {"calibrated": {"num_inference_steps": 2, "guidance_scale": 3.0, "strength": 0.6, "method": "sdedit"},
             "provenance": {"command": "rwopt search recipe=editing weights.kinds=[self,ff]", "calls": 12}}  # fmt: skip
    schedule = Schedule(sites, np.array([5.0, 0.5]), weights, **about)
    path = tmp_path_factory.mktemp("schedule") / "mine.json"
    schedule.save(path)
    return path


def columns(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


# light


@pytest.mark.parametrize("arguments", [["--help"], ["search", "--help"], ["--version"]])
def test_help_is_quick_and_light(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom rwopt.cli import main\n"
        f"try: main({arguments})\nexcept SystemExit as end: assert end.code == 0\n"
        f"print('heavy:', [m for m in {HEAVY} if m in sys.modules])"
    )
    seconds = []
    while len(seconds) < 3 and min(seconds, default=1.0) >= 0.5:  # processor time: the machine may be busy
        before = os.times()
        assert "heavy: []" in python(code)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.5, seconds


def test_importing_the_package_imports_nothing_heavy() -> None:
    out = python(f"import sys, rwopt; print([m for m in {HEAVY} if m in sys.modules], rwopt.__version__)")
    assert out.startswith("[] ")


def test_public_names_are_what_they_say_whoever_imported_their_modules_first() -> None:
    python(
        "import rwopt.unet.apply\nfrom rwopt.unet.attachment import Attachment\nimport sys\n"
        "assert rwopt.apply is sys.modules['rwopt.unet.apply'].apply\n"
        "assert rwopt.Attachment is Attachment\n"
        "from rwopt import apply\nassert apply is rwopt.apply\n"
        "import rwopt.schedule, rwopt.unet.sites\nassert rwopt.schedule.Schedule is rwopt.Schedule\n"
        "assert all(getattr(rwopt, name) is not None for name in rwopt.__all__)\n"
        "try: rwopt.nothing\nexcept AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise SystemExit(1)\n"
        # once more from nothing, the name first; what is heavy is not loaded twice
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'rwopt']: del sys.modules[name]\n"
        "old = apply\nimport rwopt\nfirst = rwopt.apply\nfrom rwopt.unet.apply import apply\n"
        "assert first is apply is not old"
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_mentions_every_argument(said: Any, verb: str) -> None:
    code, out, _ = said(verb, "--help")
    assert code == 0
    assert all(word in out for word in VERBS[verb])
    for option in re.findall(r"^  (-\S+|\S+)(?:,| [A-Z{]\S*|)(.*)$", out, re.MULTILINE):  # each with a line of text
        assert option
    assert verb in said("--help")[1]


# mistakes


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["serch"], "search"),
        ([], "verb"),
        (["search"], "no recipe"),
        (["search", "recipe=editng"], "editing"),
        (["search", "recipe=editing", "tuner.trails=3"], "tuner.trials"),
        (["search", "recipe=editing", "tuner.trials=many"], "tuner.trials"),
        (["search", "recipe=editing", "tuner.trials=0"], "at least 1"),
        (["search", "recipe=editing", "--sampler", "gp"], "--sampler"),
        (["search", "recipe=editing", "--out"], "--out"),
        (["search", "resume=nowhere"], "recipe.yaml"),
        (["search", "resume=.", "recipe=editing"], "leave out"),
        (["search", "recipe=broken.yaml"], "broken.yaml"),
        (["probe", "recipe=editing", "probe.name=ablatio"], "ablation"),
        (["probe", "resume=x"], "for search"),
        (["compare", "nowhere.json"], "nowhere.json"),
        (["compare"], "schedule.json"),
        (["show", "broken.yaml"], "broken.yaml"),
        (["show", "nowhere.json"], "nowhere.json"),
        (["sample"], "--caption"),
        (["sample", "--caption", "x", "--steps", "few"], "--steps"),
        (["edit", "--case", "99999"], "99999"),
        (["edit", "--split", "tst"], "test"),
        (["edit", "--image", "nowhere.png", "--caption", "x"], "nowhere.png"),
        (["edit", "--image", "broken.yaml"], "--caption"),
        (["recipes", "all"], "all"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(said: Any, here: Path, arguments: list[str], word: str) -> None:
    (here / "broken.yaml").write_text("task: [1\n  x")
    code, out, err = said(*arguments)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert word in err
    assert err.startswith("rwopt")
    assert [p.name for p in here.iterdir()] == ["broken.yaml"]


def test_a_mistake_in_a_process_of_its_own(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rwopt.cli", "search", "recipe=editing", "tuner.trails=3"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "rwopt: tuner.trails=3: key tuner.trails is unknown: did you mean tuner.trials?\n"


def test_files_that_cannot_be_written_are_named(said: Any, here: Path, schedule_file: Path) -> None:
    (here / "file").write_text("")
    code, _, err = said("show", schedule_file, "--png", "file/x.png")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert str(Path("file")) in err


def test_a_run_folder_is_never_used_twice(said: Any, here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "recipe.yaml").write_text(config.to_yaml(config.load("editing")))
    code, _, err = said("search", "recipe=editing", "--out", "run")
    assert code == 2
    assert "resume=run" in err
    code, _, err = said("search", "resume=run", "--out", "other")
    assert code == 2
    assert "--out other" in err


# verbs


def test_print_shows_the_resolved_recipe_wherever_the_keys_stand(said: Any, here: Path) -> None:
    code, out, _ = said("search", "recipe=editing", "--out", "x", "tuner.trials=7", "--print", "task.steps=3")
    assert code == 0
    (here / "again.yaml").write_text(out)
    settings = config.load("again.yaml")
    assert (settings.tuner.trials, settings.task.steps) == (7, 3)
    assert settings == config.load("editing", ["tuner.trials=7", "task.steps=3"])
    assert not (here / "x").exists()


def test_recipes_lists_them_all(said: Any) -> None:
    code, out, _ = said("recipes")
    assert code == 0
    whole, _, parts = out.partition("\n\n")
    lines = dict(line.split(maxsplit=1) for line in whole.splitlines())
    assert lines == {name: first for name, (_, first) in config.recipes().items()}
    assert "model=sdxl " in parts
    assert "budget=card-8gb " in parts


def test_show_prints_the_numbers(said: Any, here: Path, schedule_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = said("show", schedule_file, "--png", "drawn.png")
    assert code == 0
    for text in ("0.500", "1.500", "1.250", "0.123", "σ 5", "σ 0.5", "mid_block.attentions.0.cross", "residual",
                 "guidance_scale 3,", "recipe=editing weights.kinds=[self,ff]", "drawn.png"):  # fmt: skip
        assert text in out, text
    assert columns(here / "drawn.png").std() > 5


def test_sample_draws_plain_and_scheduled(said: Any, here: Path, schedule_file: Path) -> None:
    caption = "portrait, pale skin, long red hair"
    code, out, _ = said("sample", "--caption", caption, "--schedule", schedule_file, "--out", "both.png")
    assert (code, out.strip()) == (0, "both.png")
    assert said("sample", "--caption", caption, "--steps", 2, "--out", "plain.png")[0] == 0
    assert columns(here / "both.png").shape[1] > columns(here / "plain.png").shape[1]
    for bad in (["--steps", 0], ["--model", "/nowhere"]):
        code, _, err = said("sample", "--caption", caption, *bad)
        assert code == 2
        assert "=0" in err or "/nowhere" in err


@pytest.mark.parametrize(("model", "own"), [("emoji", 3), ("avatars", 4)])
def test_an_embedded_model_draws_at_its_own_guidance(said: Any, here: Path, model: str, own: int) -> None:
    draw = "sample", "--model", model, "--caption", "woman, red hair", "--steps", 2
    for name, more in (("unsaid", []), ("own", ["--guidance", own]), ("other", ["--guidance", 6])):
        assert said(*draw, *more, "--out", f"{name}.png")[0] == 0
    assert (columns(here / "unsaid.png") == columns(here / "own.png")).all()
    assert (columns(here / "unsaid.png") != columns(here / "other.png")).any()


def test_edit_takes_a_case_or_a_picture(said: Any, here: Path, schedule_file: Path) -> None:
    assert said("edit", "--case", 3, "--steps", 2, "--out", "a.png")[0] == 0
    assert said("edit", "--case", 3, "--steps", 2, "--out", "same.png")[0] == 0
    assert said("edit", "--case", 3, "--steps", 2, "--seed", 1, "--out", "other.png")[0] == 0
    assert (columns(here / "a.png") == columns(here / "same.png")).all()
    assert (columns(here / "a.png") != columns(here / "other.png")).any()
    case = load_cases("avatars", "test", "editing", 1)[0]
    assert case.source is not None
    Image.fromarray(case.source).resize((100, 80)).save(here / "me.png")
    code, out, _ = said("edit", "--image", "me.png", "--caption", case.caption, "--schedule", schedule_file)
    assert (code, out.strip()) == (0, "edit.png")
    assert columns(here / "edit.png").std() > 5
    code, _, err = said("edit", "--case", 3, "--strength", 0)
    assert code == 2
    assert "strength=0" in err


def test_compare_prints_a_table(said: Any, here: Path, schedule_file: Path) -> None:
    other = here / "plain.json"  # the name of the plain arm, too
    Schedule.constant(("mid_block.attentions.0.cross",), np.array([1.0]), 1.0).save(other)
    code, out, _ = said("compare", schedule_file, other, "--set", *SMALL)
    assert code == 0
    for text in ("judge.objective", str(schedule_file)[:20], "test split, 5 cases"):
        assert text in out, text
    assert sorted(p.name for p in here.iterdir()) == ["plain.json"]


def test_probe_writes_and_prints_importance(said: Any, here: Path) -> None:
    code, out, _ = said("probe", "recipe=editing", *SETTINGS, "weights.kinds=[transformer]", "--out", "seen")
    assert code == 0
    assert "U-Net calls" in out
    assert "mid_block.attentions.0" in out
    assert columns(here / "seen" / "probe.png").std() > 5
    assert (here / "seen" / "importance.json").exists()


def test_sites_prints_every_id_whole(said: Any) -> None:
    code, out, _ = said("sites", "avatars")
    assert code == 0
    for site in ("down_blocks.0.attentions.0.cross", "mid_block.attentions.0", "up_blocks.1.attentions.1.ff"):
        assert site in out
    assert "output_blocks.0.1" in out  # the LDM name of up_blocks.0.attentions.0
    for name in ("Transformer2DModel", "down.1", "no effect in mode output"):
        assert name in out


def test_sites_of_a_pipelines_folder_and_of_a_unets(said: Any, here: Path) -> None:
    save_tiny_pipeline(here / "pipe")
    code, whole, _ = said("sites", "pipe")
    assert code == 0
    assert "up_blocks.1.attentions.1.cross" in whole
    code, bare, _ = said("sites", "pipe/unet")
    assert code == 0
    assert bare.splitlines()[1:] == whole.splitlines()[1:]  # but for the title


BAD_CONFIGS = {
    "{": "is not JSON",
    "[]": "is not a configuration",
    "{}": "a configuration without _class_name",
    '{"_class_name": "ControlNetModel"}': "a ControlNetModel, which has no sites",
    '{"_class_name": "UNet2DConditionModel", "down_block_types": ["X"]}': "cannot be built",
    '{"_class_name": "UNet2DModel", "block_out_channels": [7]}': "cannot be built",
}


@pytest.mark.parametrize("text", BAD_CONFIGS)
def test_sites_of_a_bad_folder_is_one_line(said: Any, here: Path, text: str) -> None:
    (here / "net").mkdir()
    code, _, err = said("sites", "net")
    assert (code, "holds no U-Net" in err) == (2, True)
    (here / "net" / "config.json").write_text(text)
    code, out, err = said("sites", "net")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert BAD_CONFIGS[text] in err


def test_sites_of_nothing_says_what_to_give(said: Any, tmp_path: Path) -> None:
    code, _, err = said("sites", tmp_path / "nothing")
    assert code == 2
    assert len(err.splitlines()) == 1
