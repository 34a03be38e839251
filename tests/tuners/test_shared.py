"""Several processes on one study: each trial ends once, none is lost, the number asked for is met."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.postgres import binaries, server
from helpers.workers import check_table, killed_workers, open_tuner

from rwopt.tuners.storage import open_storage


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A server of this module's own."""
    if binaries() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("its driver is not installed: pip install 'rwopt[postgres]'")
    with server() as url:
        yield url


@pytest.mark.parametrize("backend", ["sqlite", "postgres", "journal"])
def test_workers_killed_at_random_lose_nothing(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    urls = {"sqlite": f"sqlite:///{tmp_path / 'shared.db'}", "journal": f"journal:{tmp_path / 'shared.log'}"}
    url = urls.get(backend) or request.getfixturevalue("postgres")
    open_tuner(url, 20)
    kills = killed_workers(url, tmp_path / "log", seconds=0.25)
    print(backend, kills)
    check_table(open_storage(url), 20)
