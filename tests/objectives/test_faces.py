"""Faces: crops to the pixel, a recogniser of one's own from its file, and dlib where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rwopt.errors import UserError
from rwopt.objectives import Batch, faces
from rwopt.objectives.faces import SIDE, centre, crops, largest_faces, make, missing, tiny
from rwopt.tasks.cases import load_cases
from rwopt.tasks.pictures import to_tensor

DLIB = pytest.mark.skipif(bool(missing("face.dlib")), reason=missing("face.dlib"))


def pictures(seed: int, height: int = 64, width: int = 64) -> Tensor:
    coarse = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").contiguous()


# --- crops


def test_a_crop_at_its_own_size_is_a_slice() -> None:
    images = pictures(1, 200, 160)
    boxes = torch.tensor([[20.0, 30, 132, 142], [0, 0, 112, 112], [48, 88, 160, 200]])
    expected = [images[i, :, int(b[1]) : int(b[3]), int(b[0]) : int(b[2])] for i, b in enumerate(boxes)]
    torch.testing.assert_close(crops(images, boxes), 2 * torch.stack(expected) - 1, rtol=1e-4, atol=1e-4)


def test_a_large_face_is_made_smaller_without_moire_and_a_box_outside_is_grey() -> None:
    images = pictures(1, 448, 448)
    images[:, :, ::2] = 1 - images[:, :, 1::2]  # lines of a pixel that cancel out
    small = torch.nn.functional.avg_pool2d(2 * images - 1, 4)
    assert (crops(images, centre(images)) - small).abs().mean() < 0.02
    boxes = torch.tensor([[-900.0, -900, -700, -700]]).expand(3, 4)
    assert (crops(images, boxes) == 0).all()
    assert (crops(images, torch.full((3, 4), torch.nan)) == 0).all()


def test_the_centre_is_the_middle_square() -> None:
    assert centre(pictures(1, 64, 100)).tolist() == [[18, 0, 82, 64]] * 3
    assert centre(pictures(1, 100, 64)).tolist() == [[0, 18, 64, 82]] * 3


# --- a recogniser of one's own


def test_arcface_is_the_cosine_of_the_files_features() -> None:
    given = tiny("face.arcface")
    network = torch.jit.load(given["file"])  # type: ignore[no-untyped-call]
    a, b = pictures(1), pictures(2)
    wanted = torch.cosine_similarity(*(network(crops(x, centre(x))) for x in (a, b)))
    objective = make("face.arcface", **given)
    torch.testing.assert_close(objective(Batch(a, reference=b)), wanted)
    assert objective.spec.differentiable
    same = a.clone().requires_grad_()
    scores = objective(Batch(same, reference=a))
    torch.testing.assert_close(scores, torch.ones(3))
    assert torch.autograd.grad(scores.sum(), same)[0].isfinite().all()


def test_a_picture_without_a_face_has_no_score_and_no_gradient() -> None:
    def detector(images: Tensor) -> Tensor:
        assert not images.requires_grad
        boxes = centre(images).clone()
        boxes[images[:, 0, 0, 0] > 0.5] = torch.nan
        return boxes

    objective = make("face.arcface", **tiny("face.arcface"), detector=detector)
    images, reference = pictures(1), pictures(2)
    images[:, 0, 0, 0], reference[:, 0, 0, 0] = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    images.requires_grad_()
    scores = objective(Batch(images, reference=reference))
    assert scores.isnan().tolist() == [False, True, True]
    gradient = torch.autograd.grad(scores.nan_to_num().sum(), images)[0]
    assert gradient.isfinite().all()
    assert (gradient[1:] == 0).all()


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")), reason="onnx, onnxruntime missing"
)
def test_an_onnx_file_gives_the_same_without_a_gradient(tmp_path: Path) -> None:
    import onnx
    from onnx import helper, numpy_helper

    torch.manual_seed(0)
    layer = nn.Linear(3, 5)
    nodes = [
        helper.make_node("AveragePool", ["faces"], ["pooled"], kernel_shape=[SIDE, SIDE]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["features"], transB=1),
    ]
    weights = [numpy_helper.from_array(p.detach().numpy(), n) for n, p in (("w", layer.weight), ("b", layer.bias))]
    ends = [helper.make_tensor_value_info("faces", 1, [1, 3, SIDE, SIDE])], [
        helper.make_tensor_value_info("features", 1, [1, 5])
    ]
    model = helper.make_model(helper.make_graph(nodes, "tiny", *ends, weights),
                              opset_imports=[helper.make_opsetid("", 17)], ir_version=8)  # fmt: skip
    onnx.save(model, tmp_path / "tiny.onnx")
    objective = make("face.arcface", file=str(tmp_path / "tiny.onnx"))
    a, b = pictures(1).requires_grad_(), pictures(2)
    scores = objective(Batch(a, reference=b))
    assert not objective.spec.differentiable
    assert not scores.requires_grad
    wanted = torch.cosine_similarity(*(layer(crops(x, centre(x)).mean((2, 3))) for x in (a, b)))
    torch.testing.assert_close(scores, wanted.detach(), rtol=1e-4, atol=1e-5)


def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"not a network")
    for given, line in (
        ({}, "no file is given: set its option file"),
        ({"file": str(tmp_path / "none.pt")}, "is no file: set its option file"),
        ({"file": str(broken)}, "cannot be opened .*: give a TorchScript"),
        ({**tiny("face.arcface"), "detector": "center"}, "detector=center: did you mean centre"),
        ({**tiny("face.arcface"), "size": 3}, "has no option size: it takes file, detector"),
    ):
        with pytest.raises(UserError, match=line) as caught:
            make("face.arcface", **given)
        assert "\n" not in str(caught.value)


# --- dlib


@pytest.fixture(scope="module")
def drawings() -> Tensor:
    """Drawings in some of which dlib finds a face."""
    pictures = to_tensor([case.truth for case in load_cases("avatars", "test", "editing", 8)])
    assert pictures is not None
    return pictures


@DLIB
def test_dlib_knows_a_face_and_finds_none_where_none_is(drawings: Tensor) -> None:
    images = torch.cat([drawings, torch.full((1, 3, 64, 64), 0.5)])
    found = largest_faces(images).isfinite().all(1)
    assert found.any()
    assert not found[-1]
    objective = make("face.dlib")
    scores = objective(Batch(images, reference=images))
    assert torch.equal(scores.isfinite(), found)
    torch.testing.assert_close(scores[found], torch.ones(int(found.sum())))
    one = images[found][:1]
    noise = 0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(0))
    noisy = objective(Batch((one + noise).clamp(0, 1), reference=one))
    assert noisy.isnan().all() or (noisy < 1).all()
    assert not objective(Batch(one.clone().requires_grad_(), reference=one)).requires_grad


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^objective face.dlib lacks dlib and face_recognition_models: pip"):
        make("face.dlib")
    with pytest.raises(UserError, match=r"^objective face.arcface lacks dlib and face_recognition_models"):
        make("face.arcface", **tiny("face.arcface"), detector="dlib")
