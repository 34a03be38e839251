"""The emoji world: what code points say, captions, splits, and pictures composed of drawings."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch

from training.emoji.drawings import COLOURS, SIDE, SIZE, ZOOM, Drawings
from training.emoji.stages import Stage
from training.emoji.world import GENDERS, HAIRS, SKINS, STYLES, Look, caption, hidden, part, plain, split_of, target

FIREFIGHTER = ("1f9d1", "1f692")
KNOWN = [36, 41, 58]
"""Which of sixty jobs are test cases, done by dark 3d men: cases on disk and drawings in training must agree."""
PEOPLE = [
    Look(*look) for look in product(STYLES, [f"job {i}" for i in range(60)], SKINS, GENDERS)
]  # as many as there are in the drawings, about


@pytest.mark.parametrize(("points", "found"), [
    ("1f469-200d-1f692", (FIREFIGHTER, None, "woman", None)),
    ("1f468-1f3fe-200d-1f692", (FIREFIGHTER, "medium-dark", "man", None)),
    ("1f9d1-1f3fb-200d-1f692", (FIREFIGHTER, "light", "person", None)),
    ("1f9b8-1f3ff-200d-2640-fe0f", (("1f9b8",), "dark", "woman", None)),
    ("1f9b8", (("1f9b8",), None, None, None)),
    ("1f468-1f3fd-200d-1f9b0", (("1f9d1",), "medium", "man", "red hair")),
    ("1f468-200d-1f469-200d-1f467", (("1f468", "1f469", "1f467"), None, None, None)),  # a family has no one gender
    ("1f34e", (("1f34e",), None, None, None)),
    ("1f469-1f3fb-200d-1f91d-200d-1f469-1f3ff", None),  # two skin tones
])  # fmt: skip
def test_code_points_are_taken_apart(points: str, found: object) -> None:
    assert part(plain(points)) == found


def test_captions_are_plain_words() -> None:
    job, apple = Look("3d", "firefighter", "medium-dark", "woman"), Look("noto", "red apple")
    bare = Look("flat", "person", "dark", "man", "curly hair")
    assert caption(job, "violet") == "3d emoji, woman firefighter, medium-dark skin, violet background"
    assert caption(apple, "sky") == "noto emoji, red apple, sky background"
    assert caption(bare, "mint") == "flat emoji, man, curly hair, dark skin, mint background"
    assert caption(bare, "mint", {"background"}) == "emoji, person, mint background"
    assert caption(job, "violet", set()) == "emoji, firefighter"
    assert caption(Look("3d", "swimming", "light", "person"), "sky").split(", ")[1] == "person swimming"
    assert caption(Look("3d", "singer", "light", "person"), "sky").split(", ")[1] == "singer"
    assert hidden(apple) == ["skin", "gender", "hair"]
    assert hidden(bare) == []
    assert target(apple, "sky") == {"style": "noto", "subject": "red apple", "skin": SKINS[0], "gender": GENDERS[0],
                                    "hair": HAIRS[0], "background": "sky"}  # fmt: skip


def test_combinations_are_split_the_same_way_always() -> None:
    places = Counter(split_of(look) for look in PEOPLE)
    shares = {name: count / len(PEOPLE) for name, count in places.items()}
    assert shares == pytest.approx({"train": 0.86, "test": 0.07, "validation": 0.035, "tuning": 0.035}, abs=0.012)
    known = [split_of(Look("3d", f"job {i}", "dark", "man")) for i in range(60)]
    assert [i for i, place in enumerate(known) if place == "test"] == KNOWN
    trained = {(look.style, look.subject) for look in PEOPLE if split_of(look) == "train"}
    assert trained == set(product(STYLES, [f"job {i}" for i in range(60)]))  # what is tested is seen otherwise


@pytest.fixture
def drawings() -> Drawings:
    """A red square that fills its frame, and one with nothing in it."""
    pixels = torch.zeros(2, 4, SIDE, SIDE, dtype=torch.uint8)
    pixels[0, 0] = pixels[0, 3] = 255
    return Drawings([Look("3d", "red square"), Look("flat", "nothing")], pixels)


def test_a_drawing_stands_on_its_background(drawings: Drawings) -> None:
    still = torch.tensor([[ZOOM[1], 0.0, 0.0]]).expand(12, 3)
    rows, colours = torch.tensor([0] * 6 + [1] * 6), torch.arange(6).repeat(2)
    pictures = drawings.compose(rows, colours, still)
    assert pictures.shape == (12, 3, SIZE, SIZE)
    torch.testing.assert_close(pictures[6:], COLOURS[:, :, None, None].expand(6, 3, SIZE, SIZE))
    torch.testing.assert_close(pictures[:6, :, SIZE // 2, SIZE // 2], torch.tensor([[1.0, 0, 0]]).expand(6, 3))
    torch.testing.assert_close(pictures[:6, :, 0, 0], COLOURS)  # a rim is left
    red = (pictures[0] - torch.tensor([1.0, 0, 0])[:, None, None]).abs().amax(0) < 1e-3
    assert int(red.any(0).sum()) == pytest.approx(ZOOM[1] * SIZE, abs=2)


def test_a_pose_moves_a_drawing_right_and_down(drawings: Drawings) -> None:
    """Of a red spot that fades out: a hard edge would fall between the samples."""
    fade = torch.sin(torch.pi * (torch.arange(SIDE) + 0.5) / SIDE) ** 2
    drawings.pixels[0, 3] = (255 * fade[:, None] * fade).round().byte()

    def centre(x: float, y: float) -> list[float]:
        picture = drawings.compose(torch.tensor([0]), torch.tensor([5]), torch.tensor([[0.5, x, y]]))[0]
        weight = picture[0] - COLOURS[5, 0]
        places = torch.arange(SIZE) + 0.5
        return [float((weight.sum(axis) * places).sum() / weight.sum()) / SIZE for axis in (0, 1)]

    assert centre(0.0, 0.0) == pytest.approx([0.5, 0.5], abs=2e-3)
    assert centre(0.1, 0.0) == pytest.approx([0.6, 0.5], abs=2e-3)
    assert centre(0.0, -0.1) == pytest.approx([0.5, 0.4], abs=2e-3)


def test_labels_are_the_captions_words(drawings: Drawings) -> None:
    told = drawings.told(torch.tensor([0, 1]), torch.tensor([2, 5]))
    assert drawings.attributes["subject"] == ["nothing", "red square"]
    assert told.tolist() == [[0, 1, -1, -1, -1, 2], [1, 0, -1, -1, -1, 5]]
    poses = [drawings.poses(4, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(poses[0], poses[1])
    assert not torch.equal(poses[0], poses[2])
    assert bool(((poses[0][:, 0] >= ZOOM[0]) & (poses[0][:, 0] <= ZOOM[1])).all())


def test_steps_fill_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 0.1 s by the clock: 600 in a minute."""
    import lightning as L

    now = [0.0]

    class Clocked(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def training_step(self, batch: object, index: int) -> torch.Tensor:
            now[0] += 0.1
            self.log("loss", self.weight)
            return self.weight**2

        def configure_optimizers(self) -> object:
            return [torch.optim.SGD(self.parameters(), 0.1)], []

    monkeypatch.setattr("training.emoji.stages._now", lambda: now[0])
    stage = Stage("clocked", lambda steps: Clocked(), lambda rng: None, lambda module: None, seed=0)
    assert stage.steps_in(1.0) == pytest.approx(600, abs=1)
