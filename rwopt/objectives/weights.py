"""Weights of reward networks: where they are had, whether they are there, and loading that leaves no key behind.

rwopt downloads nothing on its own but what the hub's own client fetches for a hub id. Weights may lie in a file, in a
folder, or on the hub (in its cache, on a machine without a network).
"""

from __future__ import annotations

import atexit
import hashlib
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from rwopt.errors import UserError
from rwopt.models.quiet import quiet
from rwopt.objectives.objective import check_options

Network = TypeVar("Network", bound=nn.Module)

ANY = "any"
"""As a checksum: whatever the file is, such as a head that was trained at home."""

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_KINDS = {str: "a text", float: "a number", int: "a whole number", bool: "true or false"}
_SILENT = set[str]()  # hubs that did not answer, not asked again by this process
_NOT_WEIGHTS = ("position_ids", "attn_mask")  # tables that older versions saved; the networks make their own


@dataclass(frozen=True)
class Source:
    """One thing that an objective needs.

    option: the option that names it; place: where it is had, a hub id or an address; file: its name there, a file that
    is enough to know a folder by if `folder`; licence; size in bytes, about; sha256: of the published file, or its
    first digits, "" where it is not known here.
    """

    option: str
    place: str
    file: str
    licence: str
    size: int
    sha256: str = ""
    folder: bool = False

    def missing(self, objective: str, given: str = "") -> str:
        """One line: what to fetch, and which option to set; "" if it is there, or if the hub has it.

        given: the option's value, a file, folder or hub id; "" for the place of the source.
        """
        place = Path(given or self.place).expanduser()
        if (place / self.file).is_file() or (place.is_file() and not self.folder):
            return ""
        if not place.exists() and _HUB.fullmatch(given or self.place) and _on_hub(given or self.place, self.file):
            return ""
        what = "folder" if self.folder else "file"
        wrong = f"{given} is no {what}{f' with {self.file}' if self.folder else ''} and no hub id with it"
        return (
            f"objective {objective} lacks its {self.option}{f', {wrong}' if given else ''}: download "
            f"{'all files' if self.folder else self.file} of {self.place} ({self.licence}, {in_bytes(self.size)}) and "
            f"set the objective's option {self.option} to that {what}"
        )

    def find(self, objective: str, given: str = "") -> str:
        """The file (or folder, or hub id of a folder). Raises `UserError` if it is not there."""
        absent = self.missing(objective, given)
        if absent:
            raise UserError(absent)
        place = Path(given or self.place).expanduser()
        if place.exists():  # one name for one place, so that networks are shared
            return str((place if self.folder or place.is_file() else place / self.file).absolute())
        if self.folder:
            return given or self.place
        from huggingface_hub import hf_hub_download

        try:
            return hf_hub_download(given or self.place, self.file)
        except Exception as error:  # the errors of several libraries and versions
            raise UserError(
                f"objective {objective}: {self.file} of {given or self.place} cannot be downloaded "
                f"({_first_line(error)}): download it by hand and set the objective's option {self.option} to that file"
            ) from None

    def checked(self, objective: str, given: str = "", sha256: str = "") -> tuple[str, str]:
        """The file and its SHA-256. Raises `UserError` if the file is another one.

        sha256: what it must be, or its first digits; "" for the published file's, if known; `ANY` for whatever it is.
        """
        path = self.find(objective, given)
        found, expected = checksum(path), (sha256 or self.sha256).lower()
        if expected != ANY and not found.startswith(expected):
            raise UserError(
                f"objective {objective}: {path} has sha256 {found}, not {expected}: download {self.file} of "
                f"{self.place} again, or set the option sha256 to {ANY} if it is another file on purpose"
            )
        return path, found


def in_bytes(size: int) -> str:
    """A size for people: 1.8 GB, 3.7 MB, 4 kB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e3:.0f} kB"


def checksum(path: str) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_state(path: str) -> dict[str, Tensor]:
    """Tensors by name of a `.safetensors` file or a PyTorch one (without running what a pickle may hold)."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.endswith(".safetensors"):
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"{path} is no file of weights ({_first_line(error)}): download it again") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is no table of weights by name: give a file of a state dict")
    return dict(state)


def pretrained(kind: Any, origin: str, **given: Any) -> Any:
    """A network of transformers, in float32, from the folder or hub id `origin`, or from a `config` and a `state_dict`
    that was read there.

    transformers starts at random what it misses and drops what it does not know: here either is a `UserError`.
    """
    place = None if "state_dict" in given else origin
    with quiet(), _told(origin, f"cannot be opened as {kind.__name__}"):
        network, found = kind.from_pretrained(place, output_loading_info=True, ignore_mismatched_sizes=True, **given)
    mismatched = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    strict(origin, found["missing_keys"], found["unexpected_keys"], mismatched)
    return network.float()


def filled(network: Network, origin: str, state: Mapping[str, Tensor]) -> Network:
    """`network` with all weights of `state`, which was read from `origin`. Raises `UserError` if they do not fit."""
    own = network.state_dict()
    strict(
        origin, own.keys() - state.keys(), state.keys() - own.keys(),
        [key for key in own.keys() & state.keys() if state[key].shape != own[key].shape],
    )  # fmt: skip
    network.load_state_dict({key: state[key] for key in own if key in state}, strict=False)
    return network.float()


def tokenizer(kind: Any, origin: str) -> Any:
    """A tokenizer of transformers from a folder or hub id. Raises `UserError` for one that cannot be opened."""
    with quiet(), _told(origin, "holds no tokenizer"):
        return kind.from_pretrained(origin)


def strict(origin: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str]) -> None:
    """Raise `UserError` unless all three lists of names are empty, tables that are not weights aside."""
    for what, names in (("lacks", missing), ("has too much", unexpected), ("has other shapes of", mismatched)):
        wrong = sorted(name for name in names if not name.endswith(_NOT_WEIGHTS))
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise UserError(f"{origin} {what} {wrong[0]}{more}: it is of another network, give the published weights")


@contextmanager
def measured(origin: str) -> Iterator[None]:
    """Inside, sizes of a network are read off the weights' shapes: what is not there or has another form is a
    `UserError`."""
    try:
        yield
    except KeyError as error:
        strict(origin, [str(error.args[0])], [], [])
    except (ValueError, IndexError) as error:
        raise UserError(f"{origin} is of another network ({_first_line(error)}): give the published weights") from None


def options(objective: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """All of an objective's options. Raises `UserError` for an unknown one and for one of another kind."""
    check_options(objective, given, tuple(defaults))
    for key, value in given.items():
        kind = type(defaults[key])
        number = kind is float and isinstance(value, int) and not isinstance(value, bool)
        if not (isinstance(value, kind) or number):
            raise UserError(f"objective.options: {objective} has {key}={value!r}: give {_KINDS[kind]}")
    return {**defaults, **given}


@lru_cache
def scratch(key: str, write: Callable[[Path], None]) -> Path:
    """A temporary folder filled by `write`, once a process, gone at its end."""
    folder = Path(tempfile.mkdtemp(prefix=f"rwopt-{key}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write(folder)
    return folder


@lru_cache
def _on_hub(place: str, file: str) -> bool:
    """Whether the hub's cache holds the file of a hub id, or the hub answers that it has it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(try_to_load_from_cache(place, file), str):
        return True
    url = hf_hub_url(place, file)
    host = url.removesuffix(f"/{place}/resolve/main/{file}")
    if host in _SILENT:
        return False
    try:
        get_hf_file_metadata(url, timeout=5)
    except HfHubHTTPError:  # it answers: no such id or file, or not for everybody
        return False
    except Exception:  # no network or an offline mode, in the words of several libraries and versions
        _SILENT.add(host)
        return False
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


@contextmanager
def _told(origin: str, what: str) -> Iterator[None]:
    """What transformers finds wrong with a place, in one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{origin} {what} ({_first_line(error)}): give the published folder or hub id") from None
