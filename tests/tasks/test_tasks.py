"""Tasks: the shipped cases, common random numbers, prices, and one clear line for what is wrong with a case file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from helpers.embedded import case_sets, models, stock_pipeline
from PIL import Image

from rwopt.errors import UserError
from rwopt.files import package_folder
from rwopt.models import Model
from rwopt.models.judge import NETWORKS
from rwopt.objectives.judges import panel
from rwopt.sampling.course import course_by_rule, course_of_steps
from rwopt.sampling.denoise import Condition
from rwopt.sampling.sample import sample
from rwopt.schedule import Schedule
from rwopt.schedule.steps import Steps
from rwopt.tasks import Dials, Task, make_task
from rwopt.tasks.cases import SPLITS, Case, load_cases, read_picture
from rwopt.tasks.task import attach
from rwopt.unet.apply import apply
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites

COUNTS = {"train": 128, "validation": 128, "test": 256}
SIDE = 64
PLAIN = Dials(3.0, 0.6)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return load_cases("avatars", "train", "editing", 3)


@pytest.fixture(scope="module")
def captions() -> list[Case]:
    return load_cases("avatars", "train", "generation", 3)


# --- the shipped cases


def rows_of(name: str, split: str) -> list[dict[str, Any]]:
    text = (package_folder("data") / name / f"{split}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", case_sets())
def test_shipped_cases(name: str, split: str) -> None:
    edits = load_cases(name, split, "editing")
    assert len(edits) >= COUNTS[split]
    assert len({c.kind for c in edits}) >= 6
    for case in edits:
        assert case.source is not None
        assert case.truth is not None
        assert case.source.shape == case.truth.shape == (SIDE, SIDE, 3)
        assert case.source.dtype == np.uint8
        assert not np.array_equal(case.source, case.truth)
        assert case.source_caption != case.caption
        assert len(case.change) == 1
        for attribute, value in case.change.items():
            assert case.target[attribute] == value
            assert attribute not in case.hidden  # an edit that cannot be seen could not be judged
    texts = load_cases(name, split, "generation")
    assert len(texts) >= COUNTS[split]
    assert all(c.source is None and c.target and not c.change for c in texts)
    assert len({c.id for c in edits + texts}) == len(edits) + len(texts)


@pytest.mark.parametrize("name", models())
def test_judges_know_every_target_and_what_is_hidden(name: str) -> None:
    cases = [case for split in SPLITS for task in ("editing", "generation") for case in load_cases(name, split, task)]
    for network in NETWORKS:
        judges = panel(network, name)
        wanted = judges.wanted([case.target for case in cases])
        assert {len(values) for values in wanted.values()} == {len(cases)}
        assert {attribute for case in cases for attribute in case.hidden} <= set(judges.attributes)


@pytest.mark.parametrize("name", case_sets())
def test_splits_share_no_identity(name: str) -> None:
    """What is wanted in one split is nothing in another; sources of avatars neither (emoji's may be trained on)."""
    wanted, seen = dict[str, set[tuple[str, ...]]](), dict[str, set[tuple[str, ...]]]()
    for split in SPLITS:
        rows = rows_of(name, split)
        sides = {side: {tuple(f"{k}={v}" for k, v in sorted(row[side].items())) for row in rows if side in row}
                 for side in ("source", "target")}  # fmt: skip
        wanted[split], seen[split] = sides["target"], sides["source"] | sides["target"]
    first = seen if name == "avatars" else wanted
    for one, other in itertools.permutations(SPLITS, 2):
        assert not first[one] & seen[other]
    ids = [row["id"] for split in SPLITS for row in rows_of(name, split)]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", case_sets())
def test_an_edit_changes_what_it_says_and_nothing_else(name: str) -> None:
    for split in SPLITS:
        for row in rows_of(name, split):
            if row["task"] == "editing":
                assert row["target"] == {**row["source"], **row["change"]}
                assert row["target"] != row["source"]


def test_limit_takes_the_first(cases: list[Case]) -> None:
    assert [c.id for c in cases] == [c.id for c in load_cases("avatars", "train", "editing")][:3]
    with pytest.raises(UserError, match=r"^[^\n]* has 128 editing cases, 9999 were asked for[^\n]*$"):
        load_cases("avatars", "train", "editing", 9999)


# --- own cases


def write(folder: Path, *lines: Any) -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_own_cases(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    # a line separator inside a caption is a character like another, not a new line of the file
    case = {"id": "a", "caption": "Kopf \u2028 mit Brille", "source_image": "a.png"}
    folder = write(tmp_path, json.dumps(case, ensure_ascii=False), {"id": "b", "caption": "x", "task": "generation"})
    found = load_cases(str(folder), "train", "editing")
    assert [c.id for c in found] == ["a"]
    assert found[0].caption == "Kopf \u2028 mit Brille"
    assert found[0].truth is None
    assert np.array_equal(found[0].source, picture)  # type: ignore[arg-type]
    assert [c.id for c in load_cases(str(folder), "train", "generation")] == ["a", "b"]


@pytest.mark.parametrize("bad", ["{", "", "[1, 2]", '"text"', '{"id": "a"}', '{"caption": "a"}', "null", "3"])
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, bad: str) -> None:
    folder = write(tmp_path, {"id": "a", "caption": "x"}, bad, {"id": "b", "caption": "y"})
    with pytest.raises(UserError, match=r"train.jsonl line 2 is no case \([^\n]*\): it needs id and caption$"):
        load_cases(str(folder), "train", "editing")


@pytest.mark.parametrize("cell", [16, -1, 99])
def test_a_cell_outside_its_sheet_is_named(tmp_path: Path, cell: int) -> None:
    Image.new("RGB", (1024, 64)).save(tmp_path / "train_source.png")
    folder = write(tmp_path, {"id": "a", "caption": "x", "cell": 15}, {"id": "b", "caption": "x", "cell": cell})
    with pytest.raises(UserError, match=rf"line 2: cell {cell} lies outside the sheet of source pictures$"):
        load_cases(str(folder), "train", "editing")


@pytest.mark.parametrize("side", [64, 96])
def test_a_sheet_has_sixteen_pictures_a_row_of_any_side(tmp_path: Path, side: int) -> None:
    sheet = np.random.default_rng(0).integers(0, 256, (2 * side, 16 * side, 3), np.uint8)
    Image.fromarray(sheet).save(tmp_path / "train_source.png")
    folder = write(tmp_path, {"id": "a", "caption": "x", "cell": 15}, {"id": "b", "caption": "y", "cell": 17})
    first, second = (case.source for case in load_cases(str(folder), "train", "editing"))
    assert np.array_equal(first, sheet[:side, 15 * side :])  # type: ignore[arg-type]
    assert np.array_equal(second, sheet[side:, side : 2 * side])  # type: ignore[arg-type]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task.cases=[^\n]*train.jsonl is missing[^\n]*$"):
        load_cases(str(tmp_path), "train", "editing")
    folder = write(tmp_path, {"id": "a", "caption": "x", "source_image": "none.png"})
    with pytest.raises(UserError, match=r"^picture [^\n]*none.png cannot be read[^\n]*$"):
        load_cases(str(folder), "train", "editing")
    (tmp_path / "none.png").write_text("no picture")
    with pytest.raises(UserError, match=r"none.png cannot be read"):
        read_picture(tmp_path / "none.png")


# --- tasks


def test_noise_is_a_function_of_case_and_draw(avatars: Model, cases: list[Case]) -> None:
    whole = make_task("editing", avatars, cases, 2, draws=2)
    assert [c.id for c in whole.cases] == [c.id for c in cases for _ in range(2)]
    assert whole.owner.tolist() == [0, 0, 1, 1, 2, 2]
    flat = whole.noise.flatten(1)
    assert len(torch.unique(flat, dim=0)) == 6
    assert float(flat.mean().abs()) < 0.05
    assert float(flat.std()) == pytest.approx(1, abs=0.05)
    part = make_task("editing", avatars, [cases[2], cases[0]], 3, draws=2, batch=1)
    assert torch.equal(part.noise, whole.noise[[4, 5, 0, 1]])
    assert torch.equal(make_task("editing", avatars, cases[:1], 2).noise, whole.noise[:1])


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Pictures in [0, 1] that differ by no more than the rounding of other batch sizes."""
    torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_any_subset_gives_the_same_pictures(avatars: Model, cases: list[Case]) -> None:
    whole = make_task("editing", avatars, cases, 2).images(PLAIN)
    assert whole.shape == (3, 3, 64, 64)
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1
    same(make_task("editing", avatars, cases[1:], 2).images(PLAIN), whole[1:])
    same(make_task("editing", avatars, cases, 2, batch=2).images(PLAIN), whole)


def all_ones(task: Task) -> Schedule:
    sites = [s.id for s in list_sites(task.model.unet, ("self", "cross", "ff"))]
    return Schedule.constant(sites, [10.0, 0.1])


def test_all_ones_are_the_plain_model_bit_by_bit(avatars: Model, cases: list[Case]) -> None:
    task = make_task("editing", avatars, cases[:2], 2)
    plain = task.images(PLAIN)
    ones = all_ones(task)
    assert torch.equal(task.images(PLAIN, ones), plain)
    whole = Schedule.constant([s.id for s in list_sites(avatars.unet)], [1.0], mode="output")
    assert torch.equal(task.images(PLAIN, whole), plain)
    half = Schedule(ones.sites, ones.sigmas, ones.weights / 2)
    halved = task.images(PLAIN, half)
    assert not torch.equal(halved, plain)
    with Attachment(avatars.unet, half.sites) as attachment:
        assert torch.equal(task.images(PLAIN, half, attachment), halved)
        with pytest.raises(ValueError, match="sites and the mode of the schedule"):
            task.images(PLAIN, whole, attachment)


def test_generation(avatars: Model, captions: list[Case]) -> None:
    dials = Dials(2.5)
    task = make_task("generation", avatars, captions[:2], 2, plain=dials)
    assert task.references is not None
    assert task.calls == 2
    before = avatars.calls
    assert torch.equal(task.images(dials), task.references)  # the reference is the plain picture of the same noise
    assert avatars.calls - before == 2
    assert torch.equal(task.images(Dials(2.5, strength=0.3)), task.references)  # strength means nothing here
    assert not torch.equal(task.images(Dials(5.0)), task.references)
    batch = task.describe(task.references)
    assert batch.reference is task.references
    assert batch.truth is None
    assert batch.prompts == [c.caption for c in captions[:2]]
    assert batch.target == [c.target for c in captions[:2]]
    assert batch.changed == [[], []]


def test_sdedit(avatars: Model, cases: list[Case]) -> None:
    task = make_task("editing", avatars, cases, 2, batch=2)
    assert task.calls == 2
    before = avatars.calls
    weak = task.images(Dials(3.0, 0.002))
    assert avatars.calls - before == 2 * task.calls  # two batches
    batch = task.describe(weak)
    assert batch.reference is not None
    assert batch.truth is not None
    expected = torch.from_numpy(np.stack([c.source for c in cases]))  # type: ignore[arg-type]
    assert torch.equal((batch.reference * 255).round().byte().permute(0, 2, 3, 1), expected)
    assert batch.changed == [list(c.change) for c in cases]
    assert batch.hidden == [c.hidden for c in cases]
    # next to no strength: what is left is the way through the autoencoder and two steps of hardly any noise
    through = avatars.decode(avatars.latents(batch.reference))
    assert float((weak - through).abs().mean()) < 0.05
    with Attachment(avatars.unet, ()) as attachment:
        x, cond, course = task.inputs(attachment, Dials(3.0, 0.5), slice(1, 3))
    a = float(avatars.alphas_cumprod[course.told[0]])
    assert list(course.told) == [499, 249]
    torch.testing.assert_close(x, a**0.5 * task.latents[1:] + (1 - a) ** 0.5 * task.noise[1:])  # type: ignore[attr-defined]
    assert cond.positive.shape[0] == 2


def test_inversion(avatars: Model, cases: list[Case]) -> None:
    task = make_task("editing", avatars, cases[:2], 2, method="inversion")
    assert task.calls == 4
    before = avatars.calls
    first = task.images(PLAIN)
    assert avatars.calls - before == 4  # up and down
    assert torch.equal(first, task.images(PLAIN))
    assert avatars.calls - before == 6  # the way up is known
    task.images(Dials(3.0, 0.5))
    assert avatars.calls - before == 10  # another strength goes up anew
    assert not torch.equal(first, make_task("editing", avatars, cases[:2], 2).images(PLAIN))


def test_the_way_up_sees_no_weights(avatars: Model, cases: list[Case]) -> None:
    """Whichever schedule asks first, every candidate starts from the same inverted latents."""
    tasks = [make_task("editing", avatars, cases[:1], 2, method="inversion") for _ in range(2)]
    ones = all_ones(tasks[0])
    half = Schedule(ones.sites, ones.sigmas, ones.weights / 2)
    tasks[0].images(PLAIN)
    assert torch.equal(tasks[0].images(PLAIN, half), tasks[1].images(PLAIN, half))


# --- other samplers, and schedules that bring their own steps

TOLD = [940, 520, 130]


def with_steps(model: Model, gain: float = 1.0, sampler: str = "dpmpp_2m", **dials: Any) -> Schedule:
    """Three calls of a sampler at levels of one's own, and weights that differ by level and site."""
    sites = [s.id for s in list_sites(model.unet, ("self", "cross", "ff"))]
    weights = gain ** np.random.default_rng(1).uniform(-1, 1, (2, len(sites)))
    return Schedule(sites, [10.0, 0.1], weights, steps=Steps(sampler, model.table[TOLD], **dials))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "uni_pc", "euler_ancestral"])
def test_a_schedules_steps_are_the_course_of_its_pictures(avatars: Model, captions: list[Case], sampler: str) -> None:
    schedule = with_steps(avatars, 1.3, sampler, told=avatars.table[[900, 560, 100]], guidance=(2.0, 5.0, 3.0))
    task = make_task("generation", avatars, captions, 2)
    before = avatars.calls
    made = task.made(Dials(7.0), schedule)
    assert avatars.calls - before == 3
    assert schedule.steps is not None
    course = replace(course_of_steps(avatars, schedule.steps), noises=task.fresh(3))
    assert course.told == pytest.approx([900, 560, 100])
    cond = Condition(avatars.encode([c.caption for c in captions]), avatars.encode([""] * 3), 7.0)
    weights = lambda sigma: torch.from_numpy(schedule.at(sigma)).float()  # noqa: E731
    with Attachment(avatars.unet, schedule.sites) as hooks:
        latents = sample(avatars, hooks, task.noise * course.scale, cond, course, weights)
        wrong = sample(avatars, hooks, task.noise * course.scale, cond, replace(course, guidance=None), weights)
    assert made.latents is not None
    assert torch.equal(made.latents, latents)
    assert not torch.allclose(wrong, latents, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(made.images, avatars.decode(latents))
    assert torch.equal(task.images(Dials(1.0), schedule), made.images)  # the file has the guidance, not the dials


def test_weights_of_one_with_steps_are_the_stock_pipeline_at_these_timesteps(
    avatars: Model, captions: list[Case]
) -> None:
    schedule = with_steps(avatars)
    assert schedule.is_plain
    task = make_task("generation", avatars, captions, 2)
    hooks = attach(avatars, schedule)
    assert hooks.sites == ()
    hooks.remove()
    stock = StableDiffusionPipeline(
        avatars.vae, avatars.text_encoder, avatars.tokenizer, avatars.unet,
        DPMSolverMultistepScheduler.from_config(
            avatars.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing"
        ), None, None, requires_safety_checker=False,
    )  # type: ignore[no-untyped-call] # fmt: skip
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        [c.caption for c in captions], timesteps=TOLD, guidance_scale=3.0, latents=task.noise.clone(),
        output_type="latent",
    ).images  # fmt: skip
    made = task.made(Dials(3.0), schedule)
    torch.testing.assert_close(made.latents, expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(made.images, task.images(Dials(3.0)))


def test_an_edit_with_steps_starts_at_their_first_level(avatars: Model, cases: list[Case]) -> None:
    task: Any = make_task("editing", avatars, cases, 2)
    steps = Steps("ddim", avatars.table[[499, 249]])
    schedule = Schedule.constant([s.id for s in list_sites(avatars.unet)], [1.0], steps=steps)
    made = task.images(Dials(3.0, 0.9), schedule)  # whatever the strength that the dials say
    same(made, task.images(Dials(3.0, 0.5)))
    assert float((made - task.images(Dials(3.0, 0.9))).abs().max()) > 0.02


def test_candidates_with_other_steps_share_no_calls(avatars: Model, captions: list[Case]) -> None:
    task = make_task("generation", avatars, captions, 2)
    one, other = with_steps(avatars, 1.3), with_steps(avatars, 1.3, "uni_pc")
    half = with_steps(avatars, 0.7)  # as many sites, the same steps
    plain = with_steps(avatars)
    points = [(Dials(g), w) for g, w in [(3.0, one), (5.0, one), (3.0, other), (3.0, half), (3.0, plain), (3.0, None)]]
    before = avatars.calls
    together = task.candidates(points)
    assert avatars.calls - before == 3 + 3 + 3 + 2  # (one, half), other, plain; None has the task's two calls
    for made, point in zip(together, points, strict=True):
        same(made.images, task.images(*point))


@pytest.mark.parametrize(("sampler", "grid"), [("uni_pc", "karras"), ("lcm", "trailing"), ("euler_ancestral", "ays")])
def test_a_task_has_a_sampler_and_a_grid(avatars: Model, captions: list[Case], sampler: str, grid: str) -> None:
    """Noise that a sampler adds on the way is a function of case and draw, too."""
    whole = make_task("generation", avatars, captions, 3, draws=2, sampler=sampler, grid=grid)
    images = whole.images(PLAIN)
    same(make_task("generation", avatars, captions[1:], 3, draws=2, batch=3, sampler=sampler, grid=grid).images(PLAIN),
         images[2:])  # fmt: skip
    assert len(torch.unique(images.flatten(1), dim=0)) == 6
    course = whole.course(PLAIN)
    assert (course.sampler, len(course)) == (sampler, 3)
    expected = course_by_rule(avatars, 3, sampler, grid)
    assert (course.sigmas, course.told) == (expected.sigmas, expected.told)
    draws = whole.fresh(2)
    assert torch.equal(whole.fresh(5)[:2], draws)
    assert torch.equal(whole.fresh(1), draws[:1])


# --- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, c: make_task("edit", m, c, 2), "task.name=edit is unknown: did you mean editing"),
        (lambda m, c: make_task("editing", m, [], 2), "no cases were given"),
        (lambda m, c: make_task("editing", m, c, 2, method="magic"), "task.method=magic: did you mean"),
        (lambda m, c: make_task("editing", m, [*c, Case("mine", "x")], 2), "case mine has no source picture"),
        (lambda m, c: make_task("editing", m, c, 0).images(PLAIN), "steps=0"),
        (lambda m, c: make_task("editing", m, c, 2).images(Dials(3.0, 1.5)), "strength=1.5"),
    ],
)
def test_mistakes_are_told_in_one_line(
    avatars: Model, cases: list[Case], make: Callable[[Model, list[Case]], object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make(avatars, cases)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("branch", ["both", "cond", "uncond"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_task_makes_the_stock_pipelines_picture_under_the_same_file(
    avatars: Model, captions: list[Case], branch: str, guidance: float
) -> None:
    ids = [s.id for s in list_sites(avatars.unet, ("self", "cross", "ff"))]
    schedule = Schedule.constant(ids, [14.0, 0.05], 1.15, cfg_branch=branch)
    task = make_task("generation", avatars, captions, 3)
    stock = stock_pipeline(avatars)
    with apply(stock, schedule):
        expected = stock(
            [c.caption for c in captions], num_inference_steps=3, guidance_scale=guidance, latents=task.noise.clone(),
            output_type="pt",
        ).images  # fmt: skip
    torch.testing.assert_close(task.images(Dials(guidance, 1.0), schedule), expected, rtol=0, atol=5e-3)
