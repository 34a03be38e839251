"""Other tools' files: the reference implementation's matrix, FreeU's numbers, and what is neither."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DConditionModel

from rwopt.errors import UserError
from rwopt.export import export
from rwopt.export.block_weight import transformers
from rwopt.export.imports import kinds, read_foreign
from rwopt.schedule import Schedule
from rwopt.schedule.noise import noise_table, sigma_at
from rwopt.unet.neighbours import freeu
from rwopt.unet.sites import list_sites

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def matrix(path: Path, steps: int, blocks: int = 7) -> np.ndarray:
    values = np.arange(steps * blocks).reshape(steps, blocks) / 10
    rows = "\n".join(f"- [{', '.join(map(str, row))}]" for row in values.tolist())
    path.write_text(f"importance_weight_matrix:\n{rows}\n")
    return values


@pytest.mark.parametrize("steps", [1, 3, 4, 20])
@pytest.mark.parametrize(
    ("spacing", "stock"),
    [
        ("trailing", DDIMScheduler(**SD, timestep_spacing="trailing")),
        ("leading", DDIMScheduler(**SD, timestep_spacing="leading", steps_offset=1)),
        ("linspace", EulerDiscreteScheduler(**SD, timestep_spacing="linspace")),
    ],
)
def test_the_reference_matrix_is_found_at_each_call_of_the_sampler(
    tmp_path: Path, steps: int, spacing: str, stock: Any
) -> None:
    path = tmp_path / "weights.yaml"
    values = matrix(path, steps)
    schedule = read_foreign(path, spacing=spacing)
    stock.set_timesteps(steps)
    levels = sigma_at(stock.timesteps.numpy().astype(float), noise_table(SD))
    if spacing == "linspace" and steps == 1:
        levels = schedule.sigmas  # stock linspace of one step starts at 0
    sizes = (2, 2, 2, 1, 3, 3, 3)
    np.testing.assert_array_equal(schedule.at(levels), np.repeat(values, sizes, axis=1))
    assert (schedule.mode, schedule.sites) == ("output", tuple(transformers("sd")))


def test_levels_may_be_given_and_sdxl_has_five_blocks(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    values = matrix(path, 2, 5)
    schedule = read_foreign(path, "reference", sigmas=[9, 1], mode="residual")
    assert (schedule.sites, schedule.mode) == (tuple(transformers("sdxl")), "residual")
    np.testing.assert_array_equal(schedule.at(9.0), np.repeat(values[0], (2, 2, 1, 3, 3)))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_sites_are_those_of_the_networks(family: str) -> None:
    blocks = {
        "sd": (("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3),
        "sdxl": (("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",)),
    }[family]
    unet = UNet2DConditionModel(
        down_block_types=blocks[0], up_block_types=blocks[1], block_out_channels=(8,) * len(blocks[0]),
        norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip
    assert [site.id for site in list_sites(unet)] == transformers(family)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no importance_weight_matrix"),
        ("a: 1", "has no importance_weight_matrix"),
        ("importance_weight_matrix: []", "has no importance_weight_matrix"),
        ("importance_weight_matrix: [[1, 2]]", r"row 0 has 2 numbers: give 7 \(SD\) or 5"),
        ("importance_weight_matrix: [[1, 1, 1, 1, 1], [1]]", "row 1 has 1 numbers"),
        ("importance_weight_matrix: [[1, 1, 1, 1, yes]]", "row 0, number 4 is no number but a bool"),
        ("importance_weight_matrix: [[1, 1, 1, 1, a]]", "no number but a str"),
        ("importance_weight_matrix: [[1, 1, 1, 1, .nan]]", "row 0, number 4 is nan"),
        ("importance_weight_matrix: [[1, 1, 1, 1, 1" + "0" * 400 + "]]", "number 4 is too large"),
        ("importance_weight_matrix: [[1, 1, 1, 1, " + "9" * 5000 + "]]", "is not YAML"),
        ("a: &a [1, 1]\nb: [*a, *a]", "has anchors"),
        ("[" * 5000, "is not YAML"),
        ("a: [1", "is not YAML"),
        ("!!python/object:os.system x", "is not YAML"),
        ("x" * 300_000, "is longer than"),
    ],
)
def test_what_is_no_matrix_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        read_foreign(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_freeu_from_text_file_and_folder(tmp_path: Path, tiny_unet: UNet2DConditionModel) -> None:
    expected = freeu(tiny_unet, 1.3, 1.4, 0.9, 0.2)
    tiny_unet.save_pretrained(tmp_path / "pipe" / "unet")
    path = tmp_path / "freeu.txt"
    for text in ("b1: 1.3\nb2: 1.4\ns1: 0.9\ns2: 0.2\n", '{"s1": 0.9, "s2": 0.2, "b1": 1.3, "b2": 1.4}',
                 "s1=0.9 s2=.2 b1=1.3 b2=1.4", "1.3, 1.4, 0.9, 0.2"):  # fmt: skip
        path.write_text(text)
        assert read_foreign(path, "freeu", unet=tiny_unet) == expected
    assert read_foreign("1.3,1.4,0.9,0.2", "freeu", unet=str(tmp_path / "pipe")) == expected
    windowed = read_foreign(path, "freeu", unet=tmp_path / "pipe" / "unet", window=(5.0, 1.0))
    assert windowed.at(3.0).tolist() == expected.weights[0].tolist()
    assert (windowed.at(6.0) == 1).all()
    assert (windowed.at(1.0) == 1).all()
    for given, options, says in (
        ("1.3,1.4", {"unet": tiny_unet}, "give four numbers"),
        (path, {"unet": tmp_path}, "has no config.json"),
        (path, {"unet": tiny_unet, "variant": "a"}, "FreeU variant"),
    ):
        with pytest.raises(UserError, match=says):
            read_foreign(given, "freeu", **options)


def test_kinds_and_options_are_known_by_name(tmp_path: Path) -> None:
    assert kinds() == ["csv", "freeu", "lora-block-weight", "reference", "safetensors"]
    for args, options, says in (
        (("a.bin",), {}, "its suffix tells no kind: give from= one of csv"),
        (("a.csv", "cvs"), {}, "from=cvs: did you mean csv"),
        (("a.csv",), {"unet": 1}, "files of csv take no options"),
        (("a.yaml",), {"spacin": 1}, "did you mean spacing"),
        (("a.csv",), {}, "cannot be read"),
        ((tmp_path, "reference"), {}, "cannot be read"),
    ):
        with pytest.raises(UserError, match=says):
            read_foreign(*args, **options)


BITS = [b"9" * 5000, b"\xff", b"nan", b"1e999", b"[", b"]", b"{", b'"', b",", b"\n", b"-", b"\x00", b"'", b": ", b"<<",
        b"!!int ", b"~", b"\xe2\x80\xae", b"[[", b"# ", b"\\ud800", b"NaN"]  # fmt: skip


def test_mutated_files_of_all_kinds_are_schedules_or_refused_in_one_line(tmp_path: Path) -> None:
    """By seed; `RWOPT_FUZZ` as in tests/schedule/test_fuzz.py."""
    schedule = Schedule.constant(transformers("sd")[:3], [9.0, 1.0], 1.5, model={"family": "sd15"})
    for name in ("csv", "safetensors"):
        export(schedule, name, tmp_path / f"a.{name}")
    (tmp_path / "a.txt").write_text("# c\nX:1" + ",0.5" * 16 + "\n")
    (tmp_path / "a.yaml").write_text("importance_weight_matrix:\n- [1,1,1,1,1,1,1]\n- [1,1,.5,1,1,1,1]\n")
    sources = {path.name: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    good = 0
    for seed in range(int(os.environ.get("RWOPT_FUZZ", "2000")) // 5):
        draw = random.Random(seed)
        name = draw.choice([*sources])
        content = bytearray(sources[name])
        for _ in range(draw.choice([1, 1, 2, 6])):
            at, action = draw.randrange(len(content) + 1), draw.randrange(3)
            if action == 0:
                content[at:at] = draw.choice(BITS)
            elif action == 1:
                del content[at : at + draw.choice([1, 3, 40])]
            else:
                content[at:at] = content[at // 2 : at // 2 + 30]
        path = tmp_path / name
        path.write_bytes(bytes(content))
        try:
            read_foreign(path).save(tmp_path / "again.json")
            good += 1
        except UserError as error:
            message = str(error)
            assert message.isprintable(), (seed, message)
            assert len(message) < 500 + len(str(path)), seed
    assert good


def test_stock_schedulers_of_two_orders_find_their_rows(tmp_path: Path) -> None:
    """Midpoints and other step counts take the nearest row."""
    path = tmp_path / "w.yaml"
    values = matrix(path, 4)
    schedule = read_foreign(path, spacing="trailing")
    stock = DPMSolverMultistepScheduler(**SD, timestep_spacing="trailing")
    stock.set_timesteps(8)
    rows = schedule.at(sigma_at(stock.timesteps.numpy().astype(float), noise_table(SD)))[:, 0]
    assert set(rows.tolist()) == set(values[:, 0].tolist())
