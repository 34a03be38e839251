"""Where a study lives: one text, `tuner.storage`, becomes an Optuna storage. Imports Optuna only when one is opened.

    sqlite:///study.db                       a file on a local disk, few processes
    postgresql://user@host/database          any number of processes and machines (mysql:// where its driver is there)
    journal:/shared/study.log                a file on NFS, for which SQLite's locks are no good
    grpc://host:13000                        a proxy before a database, for thousands of clients

Databases keep heartbeats by their own clock; journal and proxy have none, so that trials carry leases instead
(`rwopt.tuners.leases`). Passwords stay out of the text, which is written to run folders and records: libpq reads
PGPASSWORD and ~/.pgpass.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rwopt.errors import UserError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

SCHEMES = ("sqlite", "postgresql", "mysql", "journal", "grpc")
DRIVERS = {"postgresql": ("psycopg", "pip install 'rwopt[postgres]'"), "mysql": ("pymysql", "pip install pymysql")}
WAIT = 60  # seconds that a writer waits for SQLite's lock
ANSWER = 10.0  # seconds within which a proxy must answer


def check_url(text: str) -> str:
    """The text itself; `UserError` for an unknown scheme (with the nearest), no place, or a password in it."""
    scheme, colon, rest = text.partition(":")
    base, _, driver = scheme.partition("+")
    if not colon or base not in SCHEMES or (driver and base not in DRIVERS):
        near = difflib.get_close_matches(base, SCHEMES, 1, 0)[0]
        example = "sqlite:///study.db, postgresql://user@host/database, journal:/shared/study.log, grpc://host:13000"
        raise UserError(f"tuner.storage={text}: did you mean {near}:...? (for example {example})")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise UserError(f"tuner.storage={text}: {error}: give scheme://host:port/...") from None
    if parts.password is not None:
        shown = text.replace(f":{parts.password}@", ":...@")
        raise UserError(f"tuner.storage={shown} has a password, and run records would too: use PGPASSWORD or ~/.pgpass")
    if base == "grpc" and (not parts.hostname or port is None):
        raise UserError(f"tuner.storage={text}: a proxy is given as grpc://host:port")
    if base == "journal" and not rest.strip("/"):
        raise UserError(f"tuner.storage={text}: a journal is given as journal:/path/of/file")
    if base in ("sqlite", *DRIVERS) and not rest.startswith("//"):
        raise UserError(f"tuner.storage={text}: write {base}://... (sqlite:///relative.db, sqlite:////absolute.db)")
    return text


def absolute_url(text: str) -> str:
    """The same place, whatever the working folder is later: a relative path of SQLite or a journal becomes absolute."""
    check_url(text)
    scheme, _, rest = text.partition(":")
    if scheme == "sqlite" and rest.startswith("///") and rest not in ("///", "///:memory:"):
        path, query, options = rest[3:].partition("?")
        return f"sqlite:///{Path(path).absolute()}{query}{options}" if not path.startswith("file:") else text
    if scheme == "journal" and not rest.startswith("/"):
        return f"journal:{Path(rest).absolute()}"
    return text


def open_storage(text: str, heartbeat: float = 10, grace: float = 60, lock: int = 30) -> BaseStorage:
    """The storage behind `text`, made if it is a file or an empty database.

    heartbeat, grace: seconds between a database's signs of life, and without one until a trial counts as left.
    lock: seconds until a journal's lock is taken from a process that was killed while it wrote.
    Raises `UserError` if the place cannot be reached or a driver is missing.
    """
    check_url(text)
    scheme = text.partition(":")[0].partition("+")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # heartbeats, proxy and short locks are called experimental
        if scheme == "journal":
            return _journal(Path(text.partition(":")[2]), lock)
        if scheme == "grpc":
            return _proxy(text)
        return _database(text, scheme, math.ceil(heartbeat), math.ceil(grace))


def _journal(path: Path, lock: int) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    path = Path("/" + str(path).lstrip("/")) if str(path).startswith("//") else path  # journal:///path is meant so
    if not path.parent.is_dir():
        raise UserError(f"tuner.storage=journal:{path}: the folder {path.parent} does not exist: make it first")
    return JournalStorage(JournalFileBackend(str(path), JournalFileSymlinkLock(str(path), lock)))


def _proxy(text: str) -> BaseStorage:
    from optuna.storages import GrpcStorageProxy

    if importlib.util.find_spec("grpc") is None:
        raise UserError(f"tuner.storage={text} needs the package grpcio: pip install 'rwopt[grpc]'")
    parts = urlsplit(text)
    proxy = GrpcStorageProxy(host=parts.hostname or "", port=parts.port or 0)
    try:
        proxy.wait_server_ready(ANSWER)
    except ConnectionError:
        remedy = "start one with optuna.storages.run_grpc_proxy_server"
        raise UserError(f"tuner.storage={text}: no proxy answers there: {remedy}") from None
    return proxy


def _database(text: str, scheme: str, heartbeat: int, grace: int) -> BaseStorage:
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage, get_storage
    from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

    options: dict[str, Any] = {"pool_pre_ping": True}
    if scheme == "sqlite":
        options = {"connect_args": {"timeout": WAIT}}
        folder = Path(text.partition(":///")[2]).parent
        if not folder.is_dir():
            raise UserError(f"tuner.storage={text}: the folder {folder} does not exist: make it first")
    else:
        driver, remedy = DRIVERS[scheme]
        if "+" not in text.partition(":")[0]:
            text = text.replace(f"{scheme}:", f"{scheme}+{driver}:", 1)
            if importlib.util.find_spec(driver) is None:
                raise UserError(f"tuner.storage={text} needs the package {driver}: {remedy}")
    attempts = 6
    for attempt in range(attempts):
        try:
            storage = RDBStorage(text, options, heartbeat_interval=heartbeat, grace_period=grace)
            break
        except RuntimeError:  # Optuna advises to update Optuna: it takes any table of schema versions for its own
            remedy = "give Optuna's studies a database of their own"
            raise UserError(f"tuner.storage={text}: that database holds tables of another tool: {remedy}") from None
        except (ArgumentError, ImportError, ModuleNotFoundError) as error:
            raise UserError(f"tuner.storage={text}: {_line(error)}: correct the URL or install its driver") from None
        except (SQLAlchemyError, StorageInternalError) as error:
            # several processes may be making the tables at once, each for itself: one wins, the others look again
            if attempt == attempts - 1 or (isinstance(error, OperationalError) and scheme != "sqlite"):
                raise UserError(f"tuner.storage={text}: {_line(error)}: check that you can reach it") from None
            time.sleep(0.1 * 2**attempt)
    if scheme == "sqlite":
        _serialise(storage.engine)
    return get_storage(storage)


def _serialise(engine: Any) -> None:
    """Let SQLite's transactions begin with the write lock.

    It has no SELECT ... FOR UPDATE, so two processes could both see a trial waiting and both take it; and one that
    reads and then writes fails at once when another wrote in between, however long it would have waited.
    """
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections made before this have the old habit


def _line(error: BaseException) -> str:
    return " ".join(str(getattr(error, "orig", None) or error).split())[:200]
