"""Models and pictures of one's own: each command of these two pages is run, on small twins and with small limits.

The pages' places are made in an empty folder: a name of the hub is a folder of that name there, so that the commands
are run as they are printed, with further settings behind them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.families import UNETS, save_family, save_lora, save_single_file
from PIL import Image
from safetensors.torch import save_file

from rwopt import config
from rwopt.cli import main
from rwopt.errors import UserError
from rwopt.progress import Silent
from rwopt.schedule import Schedule
from rwopt.search.search import Search

ROOT = Path(__file__).parents[2]
PAGES = ("docs/your-model.md", "docs/your-pictures.md")
SMALL = ["task.batch=4", "task.steps=1", "task.teacher.steps=2", "task.train=1", "task.validation=1", "task.test=1",
         "tuner.name=spsa", "tuner.trials=1", "gradient.batch=1", "weights.kinds=[cross]", "weights.group_by=kind",
         "probe.cases=1", "probe.start=none", "arms=[plain,learned]", "track.wandb=off", "model.dtype=float32",
         "model.checkpointing=off", "model.device=cpu"]  # fmt: skip
SIZES = ((80, 64), (64, 96), (128, 70), (65, 65), (200, 64))
"""Width and height of the photos."""


def commands() -> Iterator[str]:
    """Every command of the pages, a line each."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield from (line for line in block.replace("\\\n", " ").splitlines() if shlex.split(line, comments=True))


def split_of(name: str) -> str:
    """Where a picture of that name goes, as `data/README.md` says."""
    place = int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12
    return "train" if place < 0.6 else "validation" if place < 0.8 else "test"


def names(number: int) -> list[str]:
    """File names of so many pictures, some for each split."""
    found = [f"photo {i}.png" for i in range(100)]
    first = [next(name for name in found if split_of(name) == split) for split in ("train", "validation", "test")]
    return [*first, *(name for name in found if name not in first)][:number]


def photos(folder: Path, number: int = 5) -> list[str]:
    """Pictures of unlike sizes in a new folder; their names."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, (width, height) in zip(names(number), SIZES * number, strict=False):
        Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
    return names(number)


def lines(number: int) -> list[str]:
    return [f"portrait, red hair, number {i}" for i in range(number)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds all that the pages name."""
    home = tmp_path_factory.mktemp("home")
    sd, xl = save_family("sd1", home / "models" / "stable-diffusion-v1-5"), save_family("sdxl", home / "models/my-sdxl")
    for name, place in (("stable-diffusion-v1-5/stable-diffusion-v1-5", sd),
                        ("stabilityai/stable-diffusion-xl-base-1.0", xl),
                        ("madebyollin/sdxl-vae-fp16-fix", xl / "vae")):  # fmt: skip
        (home / name).parent.mkdir(exist_ok=True)
        shutil.copytree(place, home / name)
    save_single_file(sd, home / "models" / "dreamshaper_8.safetensors")
    save_single_file(xl, home / "models" / "my-sdxl.safetensors")
    made = {"timbrooks/instruct-pix2pix": 8, "stable-diffusion-v1-5/stable-diffusion-inpainting": 9}
    for name, channels in made.items():
        (home / name).parent.mkdir(exist_ok=True)
        shutil.copytree(sd, home / name)
        UNet2DConditionModel(**UNETS["sd1"], in_channels=channels).save_pretrained(home / name / "unet")
    (home / "loras").mkdir()
    save_lora("sdxl", home / "lora").rename(home / "loras" / "pixel-art.safetensors")
    (home / "embeddings").mkdir()
    save_file({"emb_params": torch.randn(2, 16)}, home / "embeddings" / "my-cat.safetensors")

    (home / "prompts.txt").write_text("\n".join(lines(60)))
    rows = [f'"{line}",{split_of(line)},portrait' for line in lines(60)]
    (home / "prompts.csv").write_text("\n".join(["caption,split,kind", *rows]))
    for name in photos(home / "my-lora-set", 20):
        (home / "my-lora-set" / name).with_suffix(".txt").write_text(f"portrait, {name}")
    photos(home / "photos")
    (home / "photos" / "instruction.txt").write_text("portrait, pale skin\n")
    for name in names(5):
        with Image.open(home / "photos" / name) as picture:
            Image.new("L", picture.size, 255).save((home / "photos" / name).with_suffix(".mask.png"))
    rows = [f'photos/{name},portrait,"portrait, pale skin",{split_of(name)}' for name in names(5)]
    (home / "edits.csv").write_text("\n".join(["source_image,source_caption,caption,split", *rows]))
    pie = home / "PIE-Bench_v1"
    mapping = {
        name: {"original_prompt": "a [face]", "editing_prompt": "a [cat]", "image_path": name,
               "editing_type_id": str(i % 10), "mask": [0, 64]}
        for i, name in enumerate(photos(pie / "annotation_images", 10))
    }  # fmt: skip
    (pie / "mapping_file.json").write_text(json.dumps(mapping))
    return home


@pytest.mark.parametrize("line", list(commands()))
def test_the_command_runs(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.chdir(home)
    program, *words = shlex.split(line, comments=True)
    assert program == "rwopt"
    more = ["task.size=[96,64]"] if "task.size" in line else []
    if words[-1].endswith("dreamshaper_8.safetensors"):  # here is no hub that could say what the file is
        more.append("model.config=models/stable-diffusion-v1-5")
    assert main([*words, *SMALL, *more, "--out", str(tmp_path / "run")]) == 0
    schedule = Schedule.load(tmp_path / "run" / "schedule.json")
    assert schedule.calibrated["resolution"] == ([96, 64] if more[:1] == ["task.size=[96,64]"] else [64, 64])
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "run" / "grid.png").exists()


def test_what_was_done_to_photos_is_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["search", "recipe=few-steps-editing", "model=sdxl", f"model.name={home / 'models/my-sdxl'}",
             f"task.cases={home / 'photos'}", *SMALL, "--dry-run"]  # fmt: skip
    assert main(words) == 0
    assert re.search(r"^pictures: \d of 3 cases: source picture cropped", capsys.readouterr().out, re.MULTILINE)


def test_changed_cases_are_noticed_on_resume(home: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    shutil.copy(home / "prompts.txt", own)
    settings = config.load(
        "few-steps", [*SMALL, f"model.name={home / 'models/stable-diffusion-v1-5'}", f"task.cases={own}"]
    )
    Search(settings, tmp_path / "run", Silent())
    own.write_text(own.read_text().replace("red", "brown"))
    with pytest.raises(UserError, match=r"^task.cases=[^\n]* has changed[^\n]*use a new folder$"):
        Search(settings, tmp_path / "run", Silent())
