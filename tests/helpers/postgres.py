"""A PostgreSQL server of one's own: a temporary folder, a free port of the loopback, gone afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def binaries() -> Path | None:
    """Where `initdb` is: Debian keeps it off the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[-3]))
    found = str(debian[-1]) if debian else shutil.which("initdb")
    return None if found is None else Path(found).parent


@contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database. As root it runs as user postgres: the server refuses to be root."""
    place = binaries()
    assert place is not None
    options = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="rwopt-postgres-"))  # pytest's own folders are closed to other users
    if options:
        shutil.chown(folder, "postgres", "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data, log = folder / "data", folder / "log"
    try:
        subprocess.run(
            [place / "initdb", "-D", data, "-U", "rwopt", "-A", "trust", "-N", "--locale=C", "-E", "UTF8"],
            check=True, capture_output=True, cwd=folder, **options,  # type: ignore[call-overload]
        )  # fmt: skip
        with open(log, "w") as out:
            process = subprocess.Popen(
                [place / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder, "-F"],
                stdout=out, stderr=out, cwd=folder, **options,  # type: ignore[call-overload]
            )  # fmt: skip
        try:
            ready = [place / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
            end = time.monotonic() + 30
            while subprocess.run(ready, check=False).returncode != 0:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            yield f"postgresql://rwopt@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # sessions are cut off, then it ends
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
