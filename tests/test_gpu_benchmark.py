"""`benchmarks/gpu.py --small`, where there may be no GPU: every part but the search, which has tests of its own."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("sites", "kernels", "gradient", "compile")
MODULES = ("gpu", "gpu_parts", "gpu_bench", "architectures", "overhead", "comparison")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Half a minute."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    words = [str(ROOT / "benchmarks" / "gpu.py"), "--small", "--only", *PARTS, "--out", str(file)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["notes"] == [], done.stdout
    return found


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("gpu")
    for name in MODULES:
        sys.modules.pop(name, None)


def rows(result: dict[str, Any], part: str) -> list[dict[str, Any]]:
    assert not [row for row in result[part] if "error" in row]
    found: list[dict[str, Any]] = result[part]
    return found


def test_operations_that_a_schedule_adds(result: dict[str, Any]) -> None:
    """At most one at a transformer, a branch or a resnet, three at a skip's join, none besides."""
    counted = [row for row in rows(result, "sites") if "operations" in row]
    assert {row["model"] for row in counted} == {"SD1.5", "SDXL"}
    plain = {row["model"]: row["operations"] for row in counted if row["method"] == "plain"}
    places = {}
    for row in counted:
        extra, allowed = row["operations"] - plain[row["model"]], row["modules"] + 3 * row["joins"]
        if not row["method"].startswith("FreeU"):
            assert 0 <= extra <= allowed, row
        places[row["model"], row["method"]] = row["modules"], row["joins"]
    assert places["SDXL", "branches"] == (210, 0)
    assert places["SD1.5", "all kinds"] == (16 + 48 + 22, 12)


def test_wall_clock_of_every_method(result: dict[str, Any]) -> None:
    found: dict[tuple[str, int], list[str]] = {}
    for row in rows(result, "sites"):
        found.setdefault((row["model"], row["batch"]), []).append(row["method"])
        assert row["call_ms"] > 0 if row["method"] == "plain" else row["low"] <= row["ratio"] <= row["high"]
    assert set(found) == {("SD1.5", 1), ("SD1.5", 2), ("SDXL", 1)}
    assert len({tuple(methods) for methods in found.values()}) == 1
    assert len(found["SDXL", 1]) == 9


def test_compiled(result: dict[str, Any]) -> None:
    for row in rows(result, "compile"):
        assert (row["graphs"], row["recompiles"], row["other"]["graphs"]) == (1, 0, 0)
        assert max(row["off"], row["plain_off"], row["other"]["off"]) < 0.01 < row["other"]["apart"]
    assert result["compile"]


def test_gradients(result: dict[str, Any]) -> None:
    found = [row for row in rows(result, "gradient") if "seconds" in row]
    assert all(row["finite"] and row["seconds"] > 0 for row in found)
    keys = {(row["model"], row["pictures"], row["path"], row["checkpointing"]) for row in found}
    assert len(keys) == len(found) == 2 * 2 * 2
    estimated = [row for row in rows(result, "gradient") if "estimate_gib" in row]
    assert [(row["model"], row["pictures"]) for row in estimated] == [("SD1.5", 2), ("SDXL", 1)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_what_only_a_gpu_can_tell_is_left_open(result: dict[str, Any]) -> None:
    assert {row["kernels"] for row in rows(result, "kernels")} == {None}
    assert {row["gpu_ms"] for row in rows(result, "kernels")} == {None}
    assert {row["synchronisations"] for row in rows(result, "sites") if "operations" in row} == {None}
    assert {row.get("gib") for row in rows(result, "gradient")} == {None}
    assert result["card"] == {"name": None}
    assert result["quick"]


def test_full_size_is_refused_without_a_gpu(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "find_card", lambda *_: ({"name": None}, "fork"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "gpu.json")])
    assert gpu.main() == 2
    said = capsys.readouterr()
    assert said.err == (
        "gpu.py: no CUDA device here (torch sees none): use a machine with a GPU, or try it with --small\n"
    )
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_tables(gpu: Any, result: dict[str, Any]) -> None:
    """With nothing left open, with a part that failed, and with what is there."""
    assert "None" not in gpu.markdown(result)
    full = copy.deepcopy(result) | {"quick": False}
    full["card"] = {"name": "Card", "gib": 80, "driver": "1.2", "cuda": "13.0"}
    for row in full["sites"]:
        row["synchronisations"] = 5 if row["method"] == "plain" else 6
    for row in full["kernels"]:
        row["kernels"], row["gpu_ms"] = (1000, 10.0) if row["method"] == "plain" else (1048, 10.12)
    for row in full["gradient"]:
        row["gib"] = 3.3
    full["compile"][0] |= {"cuda_graphs_skipped": 0, "synchronisations": 22, "plain_synchronisations": 2}
    full["gradient"][-2] = {"model": "SDXL", "pictures": 1, "error": "out of memory (too large)"}
    full["notes"] = [{"part": "compile", "unit": "compile, SDXL", "reason": "stopped after 9 s"}]
    full["search"] = [{"command": "rwopt search", "seconds": 9.5, "exit_code": 0, "schedule": True}]
    text = gpu.markdown(full)
    assert "None" not in text
    assert "| transformers | +16 at 16 | +48 | +1 | +11 at 11 | +48 | +1 |" in text
    assert "; 1.012 |" in text
    assert "- gradient, SDXL, pictures 1: out of memory (too large)\n- compile, SDXL: stopped after 9 s\n" in text
    assert "22 (2) | 0 |" in text
    assert "Card (80 GiB, driver 1.2, CUDA 13.0), torch" in text
    columns = [[line.count("|") for line in block.split("\n")] for block in text.split("\n\n") if block[0] == "|"]
    assert len(columns) == 4
    assert all(len(set(widths)) == 1 for widths in columns)
