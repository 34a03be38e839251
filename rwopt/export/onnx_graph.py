"""An ONNX folder of a U-Net with the weights in its graph, as ONNX pipelines load one.

Needs the extra `onnx`. `model.onnx` has the inputs and names that Optimum's pipelines use (`sample`, `timestep` [1],
`encoder_hidden_states`, ...; all single precision) and any number of rows and tokens; sizes are those that the U-Net
takes without padding. Parameters lie in `model.onnx_data`, since one file of ONNX holds 2 GB at most.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from rwopt.export.graph import OUTPUT, Traceable, accompany, check, notes, traceable
from rwopt.export.plain import write_folder
from rwopt.schedule import Schedule

ABOUT = "a U-Net as an ONNX graph with the table in it, or with the weights as one more input"
NEEDS = "unet=FOLDER of an SD 1.x, 2.x or XL U-Net or pipeline, and the extra onnx; no FreeU sites, no steps"
FOLDER = True

_OPSET = 17


def export(schedule: Schedule, place: Path, *, unet: Any, weights: str = "table", steps: bool = True) -> list[Path]:
    """Write the folder; the files written.

    unet: a live U-Net or pipeline, or its folder; weights: `table` for a graph that looks its weights up by timestep,
    `input` for one that takes `site_weights` [S] (then the folder has a reader that looks them up); steps=False leaves
    the schedule's steps behind. UserError for what a graph cannot hold, and without the package.
    """
    check(schedule, "onnx", "onnx", "onnx", weights, steps)
    with traceable(schedule, unet, weights) as found:
        return write_folder(place, lambda folder: _write(folder, schedule, found, weights))


def _write(folder: Path, schedule: Schedule, found: Traceable, weights: str) -> None:
    import torch

    onnx: Any = import_module("onnx")  # an extra, which type checkers need not find
    raw = folder / "raw"  # of a large network a file for each parameter
    raw.mkdir()
    torch.onnx.export(
        found.module, tuple(found.inputs.values()), str(raw / "model.onnx"), input_names=[*found.inputs],
        output_names=[OUTPUT], dynamic_axes={**found.axes, OUTPUT: found.axes["sample"]}, opset_version=_OPSET,
        dynamo=False,  # the other exporter takes thirty times as long, and a further package
    )  # fmt: skip
    model = onnx.load(raw / "model.onnx")
    onnx.helper.set_model_props(model, notes(schedule))
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    for file in raw.iterdir():
        file.unlink()
    raw.rmdir()
    accompany(folder, schedule, found, weights)
