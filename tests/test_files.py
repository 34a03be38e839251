"""Files are whole at every moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwopt import files


def test_text_and_bytes_land_with_their_folders(tmp_path: Path) -> None:
    path = files.write_text(tmp_path / "a" / "b" / "c.txt", "σ\n")
    assert path == tmp_path / "a" / "b" / "c.txt"
    assert path.read_bytes() == "σ\n".encode()
    assert files.write_bytes(path, b"new").read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["c.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.write_text(tmp_path / "x.json", "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_never_see_half_a_file_and_a_kill_leaves_one_temporary_at_most(tmp_path: Path) -> None:
    path, size = tmp_path / "big.txt", 2_000_000
    code = (
        "import sys; from rwopt.files import write_bytes\n"
        f"while True:\n  for c in b'ab': write_bytes({str(path)!r}, bytes([c]) * {size})"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.01)
        for _ in range(20):
            seen = path.read_bytes()
            assert len(seen) == size
            assert len(set(seen)) == 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(path.read_bytes()) == size
    others = [p for p in tmp_path.iterdir() if p != path]
    assert len(others) <= 1
    files.write_text(tmp_path / ".big.txt.killed.tmp", "half")
    files.write_text(tmp_path / "own.tmp", "mine")
    files.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.txt", "own.tmp"]


def test_sweep_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    files.sweep(tmp_path / "none")


@pytest.mark.parametrize("name", ["recipes", "data"])
def test_package_folders_exist(name: str) -> None:
    assert any(files.package_folder(name).iterdir())
