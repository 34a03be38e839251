"""Tables in README and docs are what the benchmarks' result files say, and defaults are what they chose."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from rwopt.config import ProbeSettings
from rwopt.tuners.options import GradientOptions
from rwopt.tuners.samplers import choose_sampler

ROOT = Path(__file__).resolve().parents[1]
# result file, benchmark that prints it, page, its place there
TABLES = [("editing", "comparison", "README.md", "editing"), ("generation", "comparison", "README.md", "generation"),
          ("probes", "probes", "docs/probes.md", "probes"), ("snr", "snr", "docs/probes.md", "snr"),
          ("tuners", "tuners", "docs/tuners.md", "tuners"), ("variants", "variants", "docs/tuners.md", "variants"),
          ("overhead", "overhead", "docs/apply.md", "overhead")]  # fmt: skip


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module
    for name in {module for _, module, _, _ in TABLES}:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("name", "module", "page", "place"), TABLES)
def test_a_table_is_its_result_file(benchmark: Any, name: str, module: str, page: str, place: str) -> None:
    text = (ROOT / page).read_text()
    between = re.search(rf"<!-- {place} -->\n(.*?)\n<!-- /{place} -->", text, re.DOTALL)
    assert between is not None
    assert between[1] == benchmark(module).markdown(result(name))


def test_quoted_files_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_default_tuner_is_the_one_that_won() -> None:
    found = result("tuners")
    assert found["default"] == f"gradient {GradientOptions().mode}"
    ends = {s["tuner"]: s["gain"] for s in found["starts"] if s["task"] == "editing" and "gradient full" in s["tuner"]}
    assert max(ends, key=ends.__getitem__) == "gradient full from gauss_newton"  # what `probe.start=auto` takes
    assert found["without_gradient"] == {"table": "spsa", "9 numbers": f"{choose_sampler('auto', 9, 40)}, 9 numbers"}


def test_the_default_probe_is_the_one_that_won() -> None:
    assert result("probes")["default"].partition(",")[0] == ProbeSettings().name
