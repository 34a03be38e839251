"""A run's mirror in Weights & Biases: never asks, never hangs, never stops the run; wandb is imported late."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import netrc
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rwopt import files
from rwopt.errors import UserError
from rwopt.tracking.base import Closing, plain

__all__ = ["MODES", "WandbSettings", "WandbTracker", "wandb_mode"]

MODES = ("auto", "online", "offline", "off")
log = logging.getLogger("rwopt.tracking")


@dataclasses.dataclass(frozen=True)
class WandbSettings:
    """How a run shows in W&B. `group` joins the runs of one study; `mode` is one of `MODES`."""

    mode: str = "auto"
    project: str = "rwopt"
    name: str | None = None
    group: str | None = None
    job_type: str = "search"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def wandb_mode(setting: str = "auto") -> str:
    """ "online", "offline" or "off" for one of `MODES`; never asks anybody.

    "auto" heeds WANDB_MODE, else it is online if there is a key (WANDB_API_KEY or a netrc entry), else offline. Any
    setting is "off" where wandb is not installed.

    Raises:
        UserError: an unknown setting, or "online" without a key.
    """
    if setting not in MODES:
        raise UserError(f"wandb={setting}: not a mode, choose one of {', '.join(MODES)}")
    if setting == "off":
        return "off"
    if importlib.util.find_spec("wandb") is None:
        if setting != "auto":
            log.warning("wandb=%s: wandb is not installed (pip install wandb), only metrics.jsonl is written", setting)
        return "off"
    if setting == "auto":
        wanted = os.environ.get("WANDB_MODE", "")
        known = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}
        if wanted in known:
            setting = known[wanted]
        elif _has_key():
            setting = "online"
        else:
            log.warning("wandb: no key found, the run is kept offline (wandb=off silences this)")
            return "offline"
    if setting == "online" and not _has_key():
        raise UserError("wandb=online: no key, set WANDB_API_KEY, run `wandb login`, or choose wandb=offline")
    return setting


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for place in places:
        try:
            entry = netrc.netrc(Path(place).expanduser()).authenticators(host)
        except (OSError, netrc.NetrcParseError, RuntimeError):  # absent, malformed, or no home folder
            continue
        if entry and entry[2]:
            return True
    return False


class WandbTracker(Closing):
    """A W&B run whose files live in `<folder>/wandb` and whose id is kept in `<folder>/wandb_id`.

    Opening the same folder again continues the same run. `settings.mode` must not resolve to "off". A failure of W&B
    is reported once for each verb and never stops the run.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: WandbSettings) -> None:
        self.mode = wandb_mode(settings.mode)
        if self.mode == "off":
            raise ValueError(f"wandb mode {settings.mode!r} is off here: use open_tracker, which then leaves W&B out")
        self._folder = Path(folder).absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        self.id = self._run_id()
        self._run: Any = None
        self._failed: set[str] = set()
        self._guard("start", lambda: self._start(self.mode))
        if self._run is None and self.mode == "online":  # no network, or a refused key: keep the record on disk
            self.mode = "offline"
            self._guard("start", lambda: self._start("offline"))

    def log(self, record: Mapping[str, Any], step: int | None = None) -> None:
        # The step is a value with its own axis, not W&B's counter: that one drops what a resumed run logs again.
        values = plain(record if step is None else {**record, "step": step})
        self._guard("log", lambda: self._run.log(values))

    def image(self, name: str, path: str | os.PathLike[str]) -> None:
        def send() -> None:
            import wandb

            self._run.log({name: wandb.Image(str(path))})

        self._guard("image", send)

    def artifact(
        self,
        path: str | os.PathLike[str],
        name: str,
        type: str = "schedule",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        def send() -> None:
            import wandb

            allowed = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[:128]
            artifact = wandb.Artifact(allowed, type=type, metadata=plain(metadata or {}))
            artifact.add_file(str(path))
            self._run.log_artifact(artifact)

        self._guard("artifact", send)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._guard("summary", lambda: self._run.summary.update(plain(values)))

    def close(self) -> None:
        def finish() -> None:
            import wandb

            self._run.finish()
            wandb.teardown()  # without it the log of an offline run may still be empty

        self._guard("close", finish)
        self._run = None  # so that a second close does nothing

    def _run_id(self) -> str:
        path = self._folder / "wandb_id"
        kept = path.read_text().strip() if path.exists() else ""
        if not kept:
            kept = secrets.token_hex(4)
            files.write_text(path, kept + "\n")
        return kept

    def _start(self, mode: str) -> None:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
            init_timeout=30.0,
            login_timeout=10.0,
            finish_timeout=120.0,  # the default waits for ever; what was not sent can be sent by `wandb sync`
        )
        run = wandb.init(
            mode="online" if mode == "online" else "offline",
            dir=str(self._folder),
            id=self.id,
            resume="allow" if mode == "online" else None,  # offline runs of one id are joined by `wandb sync`
            project=self._settings.project,
            name=self._settings.name,
            group=self._settings.group,
            job_type=self._settings.job_type,
            config=plain(self._settings.config),
            settings=settings,
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._run = run

    def _guard(self, what: str, action: Callable[[], None]) -> None:
        if what != "start" and self._run is None:
            return
        try:
            action()
        except Exception as error:  # whatever it is: a mirror must never stop the run
            if what not in self._failed:
                first = (str(error).strip().splitlines() or [""])[0]
                log.warning("wandb: %s failed (%s: %s), metrics.jsonl goes on", what, type(error).__name__, first)
            self._failed.add(what)
