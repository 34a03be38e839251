"""A search that went through, once for each module that says by which `COMMAND`, and of what: `RECIPE` with `CHANGES`
on a tiny model, or a fixture `settings` of its own."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.tiny import save_tiny_pipeline

from rwopt import config
from rwopt.progress import Silent
from rwopt.search.search import Search


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, request: Any) -> config.Settings:
    model = save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "model")
    return config.load(request.module.RECIPE, [*request.module.CHANGES, f"model.name={model}"])


@pytest.fixture(scope="module")
def finished(settings: config.Settings, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Any:
    """(run folder, search, report)."""
    folder = tmp_path_factory.mktemp("search") / "run"
    search = Search(settings, folder, Silent())
    return folder, search, search.run(request.module.COMMAND)
