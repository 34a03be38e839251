"""A safetensors file: weights [K, S] and sigmas [K] in double precision, the rest as JSON in its metadata.

Exact there and back. For tools that load tensors but parse no schedule file.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from rwopt.errors import UserError, one_line
from rwopt.files import write_bytes
from rwopt.schedule import Schedule
from rwopt.schedule.document import FORMAT, LIMIT, check

ABOUT = "a safetensors file: weights [levels, sites], sigmas [levels], and the rest as JSON in its metadata"
NEEDS = "any reader of safetensors; expresses everything"
FOLDER = False

_LIMIT = 10 * LIMIT


def export(schedule: Schedule, place: Path) -> list[Path]:
    """Write the file; the file written."""
    from safetensors.numpy import save

    rest = schedule.exact()
    rest["weights"] = []
    rest["grid"] = {name: value for name, value in rest["grid"].items() if name not in ("sigma", "train_timestep")}
    tensors = {"weights": np.array(schedule.weights), "sigmas": np.array(schedule.sigmas)}
    return [write_bytes(place, save(tensors, {FORMAT: json.dumps(rest)}))]


def read(path: str | Path) -> Schedule:
    """The schedule of a file. UserError of one line for anything else."""
    from safetensors import SafetensorError, safe_open

    try:
        if Path(path).stat().st_size > _LIMIT:
            raise UserError(f"{path}: is longer than {_LIMIT // 1_000_000} MB")
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(FORMAT)
            if text is None or {*file.keys()} != {"weights", "sigmas"}:
                raise UserError("holds no schedule: give a file that rwopt wrote")
            weights, sigmas = file.get_tensor("weights"), file.get_tensor("sigmas")
        rest = json.loads(text)
        if not isinstance(rest, dict) or not isinstance(rest.get("grid"), dict):
            raise UserError("its metadata is no rest of a schedule file: export it again")
        grid = {**rest["grid"], "sigma": sigmas.tolist()}
        document = {**rest, "grid": grid, "weights": weights.tolist()}
        check(document, notes=True)
        return Schedule.from_dict(document)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): give a safetensors file") from None
    except (ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path}: is no safetensors file of a schedule ({one_line(str(error))})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
