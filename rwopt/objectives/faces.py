"""Is it the same person? Face recognisers, for portraits; a picture in which no face is found has no score (NaN).

- `face.dlib`: distance d of the 128 numbers that dlib's ResNet gives for the largest face of each picture (99.4 % on
  Labeled Faces in the Wild, by its maker), as 1 - d / 1.2 from 0 on: 0.5 is the distance 0.6 below which dlib calls two
  faces one person. Has no gradient.
- `face.arcface`: cosine of the features of a recogniser of your own, such as ArcFace (Deng et al. 2019,
  arXiv:1801.07698), that takes faces of 112 x 112 pixels from -1 to 1: a TorchScript file (.pt), which has a gradient,
  or an ONNX file, which has none. Faces are the middle square of the picture, or what the option `detector` finds; they
  are not turned upright by landmarks as those that such networks were trained on, so that scores are lower than
  published ones.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rwopt.errors import UserError, one_of
from rwopt.objectives.effnet import packaged
from rwopt.objectives.frozen import Frozen
from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec, check_options
from rwopt.objectives.weights import options, scratch

DLIB, MODELS = "dlib", "face_recognition_models"
RECOGNISER, LANDMARKS = "dlib_face_recognition_resnet_model_v1.dat", "shape_predictor_5_face_landmarks.dat"
SHA256 = "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"  # of the recogniser
SAME = 0.6  # distance below which dlib takes two faces for one person's
SIDE = 112  # what ArcFace networks take, pixels
DETECTORS = ("centre", "dlib")

Detector = Callable[[Tensor], Tensor]
"""Pictures [N, 3, H, W] in [0, 1] to boxes [N, 4] of left, top, right, bottom in pixels; NaN where there is no face."""

_NEEDS = frozenset({"reference"})
_SPECS = {
    spec.name: spec
    for spec in (
        ObjectiveSpec("face.dlib", True, False, (0.0, 1.0), _NEEDS, "CC0-1.0", "whether dlib sees one person",
                      weights=f"{MODELS} {RECOGNISER}", size=22_466_066, extra="face",
                      sha256=SHA256),
        ObjectiveSpec("face.arcface", True, True, (-1.0, 1.0), _NEEDS, "your file's",
                      "cosine of a face recogniser of your own"),
    )
}  # fmt: skip


def specs() -> Mapping[str, ObjectiveSpec]:
    return _SPECS


def missing(name: str, **given: Any) -> str:
    """What is not there, in one line; "" if all is."""
    if name == "face.dlib" or given.get("detector") == "dlib":
        lacking = [package for package in (DLIB, MODELS) if importlib.util.find_spec(package) is None]
        if lacking:
            return f"objective {name} lacks {' and '.join(lacking)}: pip install dlib-bin face-recognition-models"
    if name == "face.arcface":
        file = str(given.get("file", ""))
        if not Path(file).expanduser().is_file():
            what = f"file={file} is no file" if file else "no file is given"
            return f"objective {name}: {what}: set its option file to a TorchScript (.pt) or .onnx face recogniser"
        if file.endswith(".onnx") and importlib.util.find_spec("onnxruntime") is None:
            return f"objective {name} lacks onnxruntime for {file}: pip install onnxruntime"
    return ""


def make(name: str, **given: Any) -> Objective:
    """The objective. `face.dlib` takes no options. Options of `face.arcface`:

    file: path of the network; detector: "centre" (default), "dlib", or a `Detector`.
    Raises `UserError` where something is missing.
    """
    if name == "face.dlib":
        options(name, given, {})
    else:
        check_options(name, given, ("file", "detector"))
    lacking = missing(name, **given)
    if lacking:
        raise UserError(lacking)
    if name == "face.dlib":
        return Objective(_SPECS[name], _dlib)
    file, detector = str(Path(given["file"]).expanduser()), given.get("detector", DETECTORS[0])
    if not callable(detector):
        one_of(DETECTORS, f"objective {name}: detector", str(detector))
        detector = {"centre": centre, "dlib": largest_faces}[detector]
    spec = replace(_SPECS[name], differentiable=not file.endswith(".onnx"), weights=file)
    return Objective(spec, partial(_arcface, recogniser(file), detector))


# --- dlib


@dataclass(frozen=True)
class Dlib:
    """dlib's frontal face detector, landmarks and recogniser."""

    faces: Any
    landmarks: Any
    recogniser: Any


@lru_cache(maxsize=1)
def dlib_models() -> Dlib:
    """Loaded once. The package of the models is not run: it needs an old setuptools."""
    dlib = importlib.import_module(DLIB)
    path = packaged(MODELS, RECOGNISER, SHA256)
    return Dlib(
        dlib.get_frontal_face_detector(),
        dlib.shape_predictor(str(Path(path).with_name(LANDMARKS))),
        dlib.face_recognition_model_v1(path),
    )


def _bytes(images: Tensor) -> Any:
    """uint8 [N, H, W, 3] in NumPy, as dlib takes pictures."""
    return (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _largest(picture: Any) -> Any:
    """The largest face that is found in a picture of twice the size, which finds faces from 40 pixels on; or None."""
    found = dlib_models().faces(picture, 1)
    return max(found, key=lambda box: box.area(), default=None)


def largest_faces(images: Tensor) -> Tensor:
    """A `Detector`: dlib's largest face."""
    boxes = torch.full((len(images), 4), torch.nan, device=images.device)
    for i, picture in enumerate(_bytes(images)):
        box = _largest(picture)
        if box is not None:
            edges = [box.left(), box.top(), box.right() + 1, box.bottom() + 1]
            boxes[i] = torch.tensor(edges, dtype=torch.float32)
    return boxes


def describe(images: Tensor) -> Tensor:
    """[N, 128] of the largest face of each picture; NaN where none is found."""
    rows, models = [], dlib_models()
    for picture in _bytes(images):
        box = _largest(picture)
        if box is None:
            rows.append(torch.full((128,), torch.nan))
        else:
            numbers = models.recogniser.compute_face_descriptor(picture, models.landmarks(picture, box))
            rows.append(torch.tensor(list(numbers)))
    return torch.stack(rows).to(images.device)


def _dlib(batch: Batch) -> Tensor:
    assert batch.reference is not None
    apart: Tensor = torch.linalg.vector_norm(describe(batch.images) - describe(batch.reference), dim=1)
    return (1 - apart / (2 * SAME)).clamp(min=0)


# --- a recogniser of one's own


@lru_cache(maxsize=2)
def recogniser(file: str) -> Callable[[Tensor], Tensor]:
    """Faces [N, 3, 112, 112] from -1 to 1 -> features [N, D]. Raises `UserError` for a file that cannot be opened."""
    try:
        if file.endswith(".onnx"):
            return _onnx(file)
        load: Callable[..., torch.nn.Module] = torch.jit.load
        network = torch.nn.Sequential(load(file, map_location="cpu"))  # alone it cannot be frozen
        return Frozen(network, network)
    except (RuntimeError, ValueError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{file} cannot be opened ({first}): give a TorchScript (.pt) or .onnx network") from None


def _onnx(file: str) -> Callable[[Tensor], Tensor]:
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def look(faces: Tensor) -> Tensor:  # one at a time: many such files take no more
        rows = [session.run(None, {name: face[None].cpu().numpy()})[0] for face in faces.detach()]
        return torch.cat([torch.as_tensor(row) for row in rows]).to(faces.device)

    return look


def centre(images: Tensor) -> Tensor:
    """A `Detector`: the middle square of every picture."""
    height, width = images.shape[-2:]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return images.new_tensor([left, top, left + side, top + side]).expand(len(images), 4)


def crops(images: Tensor, boxes: Tensor) -> Tensor:
    """Faces [N, 3, 112, 112] of pictures [N, 3, H, W], with a gradient; grey where a box is NaN or reaches outside.

    Pictures are sampled at the middles of the pixels of the crop, from an anti-aliased smaller one where they shrink.
    """
    height, width = images.shape[-2:]
    sides = (boxes[:, 2:] - boxes[:, :2]).nan_to_num(float(SIDE))
    faces = []
    for image, box, side in zip(images, boxes, sides, strict=True):
        shrink = min(1.0, SIDE / float(side.max()))
        size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        small = functional.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)
        steps = (torch.arange(SIDE, device=images.device) + 0.5) / SIDE
        across = 2 * (box[0] + steps * (box[2] - box[0])) / width - 1
        down = 2 * (box[1] + steps * (box[3] - box[1])) / height - 1
        grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), -1).nan_to_num(2.0)
        faces.append(functional.grid_sample(2 * small - 1, grid[None].to(small.dtype), align_corners=False))
    return torch.cat(faces)


def _arcface(look: Callable[[Tensor], Tensor], detector: Detector, batch: Batch) -> Tensor:
    assert batch.reference is not None
    features, seen = [], []
    for images in (batch.images, batch.reference):
        boxes = detector(images.detach())
        seen.append(boxes.isfinite().all(1))
        features.append(functional.normalize(look(crops(images, boxes)), dim=1))
    cosine = (features[0] * features[1]).sum(1)
    return torch.where(seen[0] & seen[1], cosine, torch.nan)


def tiny(name: str) -> dict[str, Any]:
    """Options of `face.arcface`: a network of one layer with random weights, as a TorchScript file."""
    if name != "face.arcface":
        return {}
    return {"file": str(scratch("faces", _write_tiny) / "tiny.pt")}


def _write_tiny(folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 7, 7), torch.nn.SiLU(), torch.nn.Flatten(),
                                      torch.nn.Linear(8 * 16 * 16, 16))  # fmt: skip
    trace: Callable[..., Any] = torch.jit.trace
    trace(network.eval(), torch.zeros(1, 3, SIDE, SIDE)).save(str(folder / "tiny.pt"))
