"""Files are written whole or not at all: to a temporary name in the same folder, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rwopt.errors import UserError, one_line

TEMPORARY = ".tmp"


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` (folders are made) so that a kill at any moment leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """`write_bytes` of UTF-8 text."""
    return write_bytes(path, text.encode())


def read_head(path: str | os.PathLike[str], most: int, what: str) -> bytes:
    """The first `most` bytes of a file of somebody else's. `UserError`, which asks for `what`, if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give {what}") from None
    except ValueError as error:  # of the path
        raise UserError(f"{one_line(str(path))}: cannot be read ({error}): give {what}") from None


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files that killed writes left in `folder` and below (only while nobody writes there)."""
    for path in Path(folder).rglob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep a run folder to one process; a killed one lets go of it. `UserError` if another has it."""
    from filelock import FileLock, Timeout

    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(Path(folder) / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{folder} is in the hands of another search: wait for it, or use another folder") from None


def package_folder(name: str) -> Path:
    """A folder that ships with the package (`data`, `recipes`): inside an installed copy, else in the source tree."""
    here = Path(__file__).resolve().parent
    inside = here / name
    return inside if inside.is_dir() else here.parent / name
