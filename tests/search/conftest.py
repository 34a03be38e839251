"""A search that went through, once for each module that says of what (`settings`) and by which `COMMAND`."""

from __future__ import annotations

from typing import Any

import pytest

from rwopt import config
from rwopt.progress import Silent
from rwopt.search.search import Search


@pytest.fixture(scope="module")
def finished(settings: config.Settings, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Any:
    """(run folder, search, report)."""
    folder = tmp_path_factory.mktemp("search") / "run"
    search = Search(settings, folder, Silent())
    return folder, search, search.run(request.module.COMMAND)
