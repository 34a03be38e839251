"""From a text to a storage: what is refused, and that what is opened keeps a study."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
from helpers.workers import STARTS, objective, open_tuner
from sqlalchemy import create_engine

from rwopt.errors import UserError
from rwopt.tuners.leases import has_heartbeat
from rwopt.tuners.storage import absolute_url, check_url, open_storage

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("count", [0, 1, 3, 99])
def test_a_file_whose_making_was_broken_off_is_made_to_its_end(tmp_path: Path, count: int) -> None:
    """A kill between two tables; 99: before the version is noted."""
    from optuna.storages._rdb.models import BaseModel

    url = f"sqlite:///{tmp_path / 'study.db'}"
    engine = create_engine(url)
    BaseModel.metadata.create_all(engine, tables=BaseModel.metadata.sorted_tables[:count])
    engine.dispose()
    optuna.create_study(storage=open_storage(url), study_name="a")
    assert optuna.get_all_study_names(open_storage(url)) == ["a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sqlit:///a.db", "did you mean sqlite:"),
        ("postgres://u@h/d", "did you mean postgresql:"),
        ("study.db", "did you mean"),
        ("redis://h", "did you mean"),
        ("sqlite+fast:///a.db", "did you mean sqlite:"),
        ("sqlite:a.db", "sqlite:///relative.db"),
        ("grpc://host", "grpc://host:port"),
        ("grpc://host:port", "Port could not be cast"),
        ("journal:", "journal:/path/of/file"),
        ("journal:///", "journal:/path/of/file"),
        ("postgresql://u:hush@h/d", "PGPASSWORD"),
        ("mysql+pymysql://u:hush@h/d", "has a password"),
    ],
)
def test_texts_that_are_no_storage(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check_url(text)
    assert "\n" not in str(caught.value)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["sqlite:///a.db", "sqlite:////tmp/a.db", "postgresql://u@h:5432/d", "postgresql+psycopg://h/d", "journal:/a/b.log",
     "journal:b.log", "grpc://10.0.0.1:13000", "mysql://u@h/d"],
)  # fmt: skip
def test_texts_that_are(text: str) -> None:
    assert check_url(text) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sqlite:////nowhere/at/all/a.db", "/nowhere/at/all does not exist"),
        ("journal:/nowhere/at/all/a.log", "/nowhere/at/all does not exist"),
        ("postgresql://u@127.0.0.1:1/d", "check that you can reach it"),
        ("postgresql+nodriver://u@127.0.0.1:1/d", "correct the URL"),
    ],
)
def test_places_that_cannot_be_reached_are_one_line(text: str, said: str) -> None:
    if text.startswith("postgresql:") and importlib.util.find_spec("psycopg") is None:
        said = re.escape("rwopt[postgres]")
    with pytest.raises(UserError, match=said) as caught:
        open_storage(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["sqlite:///{}", "journal:{}", "journal://{}"])
def test_a_study_outlives_the_storage_that_wrote_it(scheme: str, tmp_path: Path) -> None:
    url = scheme.format(tmp_path / "study")
    tuner = open_tuner(open_storage(url), 5)
    for _ in range(2):
        candidate = tuner.propose()
        tuner.observe(candidate, objective(candidate.values), 3)
    again = open_storage(url)
    assert has_heartbeat(again) == scheme.startswith("sqlite")
    assert [(t.candidate.origin, t.calls) for t in open_tuner(again, 5).trials()] == [(name, 3) for name in STARTS]


def test_many_may_make_one_sqlite_file_and_study_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with ThreadPoolExecutor(4) as pool:
        tuners = list(pool.map(lambda _: open_tuner(url, 6), range(4)))
        claimed = list(pool.map(lambda t: t.claim(), tuners))
    numbers = [c.number for c in claimed if c is not None]
    assert len(numbers) == len(set(numbers)) == 4
    origins = sorted(c.origin for c in claimed if c is not None)
    assert origins == ["plain", "probe", "sampler", "sampler"]  # each start once, whoever queued it
    for tuner in tuners:
        tuner.release()


def test_a_study_behind_a_proxy(tmp_path: Path) -> None:
    pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'rwopt[grpc]'")
    database = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    port = _free_port()
    serve = partial(optuna.storages.run_grpc_proxy_server, database, host="127.0.0.1", port=port)
    threading.Thread(target=serve, daemon=True).start()  # it has no end of its own
    storage = open_storage(f"grpc://127.0.0.1:{port}")
    assert not has_heartbeat(storage)
    tuner = open_tuner(storage, 3)
    for _ in range(3):
        candidate = tuner.propose()
        tuner.observe(candidate, objective(candidate.values))
    assert tuner.look().met
    assert len(optuna.load_study(study_name="run/learned", storage=database).trials) == 3


def test_a_proxy_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'rwopt[grpc]'")
    monkeypatch.setattr("rwopt.tuners.storage.ANSWER", 0.3)
    with pytest.raises(UserError, match="no proxy answers"):
        open_storage(f"grpc://127.0.0.1:{_free_port()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_dashboard_opens_the_study(tmp_path: Path) -> None:
    """`optuna-dashboard <storage>` shows trials, starts and limits: its own server answers, in this process."""
    dashboard = pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    tuner = open_tuner(storage, 2)
    candidate = tuner.propose()
    tuner.observe(candidate, objective(candidate.values), 7, {"source.ssim": -0.1})
    app = dashboard.wsgi(storage)

    def get(path: str) -> object:
        environment = {"PATH_INFO": path, "REQUEST_METHOD": "GET", "QUERY_STRING": "after=0"}
        setup_testing_defaults(environment)
        seen: list[str] = []
        body = b"".join(app(environment, lambda status, headers, *_: seen.append(status)))
        assert seen == ["200 OK"], body
        return json.loads(body)

    (study,) = get("/api/studies")["study_summaries"]  # type: ignore[index]
    assert study["study_name"] == "run/learned"
    trials = get(f"/api/studies/{study['study_id']}")["trials"]  # type: ignore[index]
    assert [t["state"] for t in trials] == ["Complete", "Waiting"]
    assert trials[0]["values"] == [objective(candidate.values)]
    assert {a["key"] for a in trials[0]["user_attrs"]} >= {"origin", "calls", "lease"}


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("sqlite:///a.db", "sqlite:///{here}/a.db"),
        ("sqlite:///b/a.db?timeout=3", "sqlite:///{here}/b/a.db?timeout=3"),
        ("journal:a.log", "journal:{here}/a.log"),
        ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
        ("journal:/tmp/a.log", "journal:/tmp/a.log"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("grpc://h:1", "grpc://h:1"),
    ],
)
def test_a_relative_place_is_one_place(text: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = absolute_url(text)
    assert url == meant.format(here=tmp_path)
    monkeypatch.chdir("/")
    assert absolute_url(url) == url


@pytest.mark.parametrize("kind", ["another tool's", "no database", "a folder"])
def test_a_file_that_holds_no_studies_is_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    if kind == "a folder":
        path.mkdir()
    elif kind == "no database":
        path.write_text("This is a text, and a rather long one, so that SQLite takes it for a damaged database. " * 9)
    else:
        with sqlite3.connect(path) as connection:
            connection.executescript(
                "create table alembic_version (version_num varchar(32) not null primary key);"
                "insert into alembic_version values ('bf29a5ff90ea');"
            )
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(UserError, match=r"^tuner\.storage=sqlite") as caught:
        open_storage(f"sqlite:///{path}")
    assert "\n" not in str(caught.value)
    assert ("another tool" in str(caught.value)) == (kind == "another tool's")
    if kind == "no database":
        assert path.read_bytes() == before
