"""An OpenVINO folder of a U-Net with the weights in its graph: `openvino_model.xml` and `.bin`, in single precision.

Needs the extra `openvino`. Inputs and their names are those of the export to `onnx`. The runtime may compute in another
precision where its device prefers one (`INFERENCE_PRECISION_HINT`), which holds for the plain U-Net as well.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from rwopt.export.graph import OUTPUT, Traceable, accompany, check, notes, traceable
from rwopt.export.plain import write_folder
from rwopt.schedule import Schedule

ABOUT = "a U-Net as an OpenVINO graph with the table in it, or with the weights as one more input"
NEEDS = "unet=FOLDER of an SD 1.x, 2.x or XL U-Net or pipeline, and the extra openvino; no FreeU sites, no steps"
FOLDER = True


def export(schedule: Schedule, place: Path, *, unet: Any, weights: str = "table", steps: bool = True) -> list[Path]:
    """Write the folder; the files written. Options and errors are those of `rwopt.export.onnx_graph.export`."""
    check(schedule, "openvino", "openvino", "openvino", weights, steps)
    with traceable(schedule, unet, weights) as found:
        return write_folder(place, lambda folder: _write(folder, schedule, found, weights))


def _write(folder: Path, schedule: Schedule, found: Traceable, weights: str) -> None:
    import torch

    openvino: Any = import_module("openvino")  # an extra, which type checkers need not find
    example = tuple(found.inputs.values())
    # torch would check a trace without gradients, where skips are weighed in place: another graph of the same numbers
    traced = torch.jit.trace(found.module, example, strict=False, check_trace=False)  # type: ignore[no-untyped-call]
    model = openvino.convert_model(traced, example_input=example)
    shapes = {}
    for port, (name, value) in zip(model.inputs, found.inputs.items(), strict=True):
        port.get_tensor().set_names({name})
        shapes[name] = [-1 if i in found.axes.get(name, {}) else n for i, n in enumerate(value.shape)]
    model.outputs[0].get_tensor().set_names({OUTPUT})
    model.reshape(shapes)
    for name, text in notes(schedule).items():
        model.set_rt_info(text, ["rwopt", name.removeprefix("rwopt.")])
    openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
    accompany(folder, schedule, found, weights)
