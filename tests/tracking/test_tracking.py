from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rwopt.errors import UserError
from rwopt.tracking import FanOut, JsonlTracker, WandbSettings, WandbTracker, open_tracker, wandb_mode


@pytest.fixture
def keyless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without any W&B setting; gives the path at which a netrc would be read."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_a_record_is_one_line_of_strict_json(tmp_path: Path) -> None:
    with JsonlTracker(tmp_path / "run") as tracker:
        tracker.log(
            {
                "score": np.float32(0.5),
                "bad": float("nan"),
                "w": np.ones((1, 2)),
                "at": Path("a/b"),
                "text": "ä\nb",
            },
            3,
        )
        tracker.log({"score": 1.0})
    first, second = (json.loads(line) for line in lines(tmp_path / "run"))
    assert first["score"] == 0.5
    assert first["bad"] is None
    assert first["w"] == [[1.0, 1.0]]
    assert first["at"] == "a/b"
    assert first["text"] == "ä\nb"
    assert first["step"] == 3
    assert first["_kind"] == "log"
    assert abs(first["_time"] - time.time()) < 60
    assert "step" not in second


def test_every_verb_can_be_read_back(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    tracker.config({"trials": 4})
    tracker.log({"score": 1}, step=0)
    tracker.image("schedule", tmp_path / "plots" / "schedule.png")
    tracker.artifact(tmp_path / "schedule.json", "best", metadata={"trial": 2})
    tracker.summary({"best": 1})
    assert [record["_kind"] for record in tracker.read()] == ["config", "log", "image", "artifact", "summary"]
    assert tracker.read("image")[0]["path"] == os.path.join("plots", "schedule.png")
    assert tracker.read("artifact")[0]["metadata"] == {"trial": 2}
    tracker.close()
    tracker.close()
    with pytest.raises(ValueError, match="closed"):
        tracker.log({"score": 2})


@pytest.mark.parametrize("torn", [b'{"score": 2, "st', b"{", b'{"score": 2, "step": 1}'[:-1], b"\0\0\0"])
def test_a_torn_last_line_is_cut_off_on_opening(tmp_path: Path, torn: bytes) -> None:
    with JsonlTracker(tmp_path) as tracker:
        tracker.log({"score": 1}, step=0)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with JsonlTracker(tmp_path) as tracker:
        assert path.read_bytes() == whole
        tracker.log({"score": 3}, step=1)
        assert [record["score"] for record in tracker.read()] == [1, 3]


def test_a_whole_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"score": 1}\n{"score": 2}')
    with JsonlTracker(tmp_path) as tracker:
        tracker.log({"score": 3})
        assert [record["score"] for record in tracker.read()] == [1, 2, 3]


def test_reading_ignores_a_line_that_is_being_written(tmp_path: Path) -> None:
    with JsonlTracker(tmp_path) as tracker:
        tracker.log({"score": 1})
        with tracker.path.open("ab") as other:
            other.write(b'{"score"')
        assert len(tracker.read()) == 1


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"a": 1}\nnot json\n{"a": 2}\n')
    with JsonlTracker(tmp_path) as tracker, pytest.raises(UserError, match="line 2"):
        tracker.read()


def test_a_killed_writer_leaves_only_whole_records(tmp_path: Path) -> None:
    code = (
        "import sys; from rwopt.tracking import JsonlTracker\n"
        "tracker = JsonlTracker(sys.argv[1]); step = 0\n"
        "while True: tracker.log({'text': 'x' * 5000}, step); step += 1"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[1])
    try:
        path, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 15
        while not (path.exists() and path.stat().st_size > 50_000) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        writer.kill()
        writer.wait()
    with JsonlTracker(tmp_path) as tracker:
        steps = [record["step"] for record in tracker.read()]
        assert len(steps) >= 10
        assert steps == list(range(len(steps)))


def test_opening_a_tracker_imports_neither_wandb_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from rwopt.tracking import open_tracker\n"
        "with open_tracker(sys.argv[1], wandb='off') as tracker: tracker.log({'a': 1})\n"
        "assert not {'wandb', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[1])


def test_mode_off_writes_only_json_lines(tmp_path: Path) -> None:
    with open_tracker(tmp_path, wandb="off", config={"trials": 2}) as tracker:
        tracker.log({"score": 1}, step=0)
        assert [record["_kind"] for record in tracker.read()] == ["config", "log"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_a_key_the_run_is_offline_with_one_notice(keyless: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("wandb")
    with caplog.at_level(logging.WARNING):
        assert wandb_mode("auto") == "offline"
    assert len(caplog.records) == 1
    assert "offline" in caplog.text
    assert wandb_mode("offline") == "offline"
    assert len(caplog.records) == 1


def test_a_key_or_a_netrc_entry_means_online(keyless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    keyless.write_text("machine example.org login user password x\n")
    assert wandb_mode("auto") == "offline"
    keyless.write_text("machine api.wandb.ai login user password x\n")
    keyless.chmod(0o600)
    assert wandb_mode("auto") == "online"
    keyless.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_mode("auto") == wandb_mode("online") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode("auto") == "offline"
    assert wandb_mode("online") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == "off"


def test_bad_modes_are_user_errors(keyless: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wandb=maybe"):
        open_tracker(tmp_path / "run", wandb="maybe")
    assert not (tmp_path / "run").exists()
    pytest.importorskip("wandb")
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        open_tracker(tmp_path / "run", wandb="online")


def test_without_wandb_installed_only_json_lines_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with open_tracker(tmp_path, wandb="offline") as tracker:
        assert len(tracker.trackers) == 1


def test_a_failing_wandb_is_reported_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: object) -> None:
        raise RuntimeError("no room\nsecond line")

    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING), open_tracker(tmp_path, wandb="offline") as tracker:
        tracker.log({"score": 1})
        tracker.summary({"best": 1})
        assert len(tracker.read()) == 2
    assert len(caplog.records) == 1
    assert "no room" in caplog.text
    assert "second line" not in caplog.text


def test_one_bad_picture_does_not_end_the_mirror(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Run:
        def __init__(self) -> None:
            self.logged: list[object] = []

        def log(self, record: object) -> None:
            self.logged.append(record)

        def finish(self) -> None:
            self.logged.append("finish")

    pytest.importorskip("wandb")
    tracker = WandbTracker.__new__(WandbTracker)
    run = tracker._run = Run()
    tracker._failed = set()
    with caplog.at_level(logging.WARNING):
        tracker.image("grid", tmp_path / "missing.png")
        tracker.image("grid", tmp_path / "missing.png")
    assert len(caplog.records) == 1
    tracker.log({"score": 1})
    assert run.logged == [{"score": 1}]


def test_an_online_run_that_cannot_start_falls_back_to_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keyless: Path
) -> None:
    wandb = pytest.importorskip("wandb")
    modes = []

    def refuse(mode: str, **_: object) -> None:
        modes.append(mode)
        raise TimeoutError("no network")

    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.setattr(wandb, "init", refuse)
    WandbTracker(tmp_path, WandbSettings("online")).close()
    assert modes == ["online", "offline"]


def test_the_offline_log_holds_scalar_config_and_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb")
    if not wandb.__version__.startswith("0.31."):
        pytest.skip("the log's private format is only known for wandb 0.31")
    from helpers.wandb_log import read_wandb_log
    from PIL import Image

    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "schedule.json").write_text("{}")
    Image.new("RGB", (4, 4)).save(folder / "grid.png")

    with open_tracker(
        folder, wandb="offline", project="test", name="first", group="study", config={"tuner": {"trials": 7}}
    ) as tracker:
        assert isinstance(tracker, FanOut)
        tracker.log({"score": 0.25}, step=5)
        tracker.log({"score": 0.5}, step=4)  # an earlier step must not be dropped
        tracker.image("grid", folder / "grid.png")
        tracker.artifact(folder / "schedule.json", "best schedule", metadata={"trial": 5})
        tracker.summary({"best": 0.5})
    (written,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    log = read_wandb_log(written)
    run_id = (folder / "wandb_id").read_text().strip()
    assert log.run == {
        "id": run_id,
        "project": "test",
        "group": "study",
        "job_type": "search",
        "name": "first",
    }
    assert log.config["tuner"] == {"trials": 7}
    scores = [(row["step"], row["score"]) for row in log.history if "score" in row]
    assert scores == [(5, 0.25), (4, 0.5)]
    assert any("grid" in key for row in log.history for key in row)
    assert ("best-schedule", "schedule", {"trial": 5}) in log.artifacts
    assert log.summary["best"] == 0.5
    assert [record["_kind"] for record in tracker.read()] == [
        "config", "log", "log", "image", "artifact", "summary",
    ]  # fmt: skip

    again = WandbTracker(folder, WandbSettings("offline"))
    assert again.id == run_id
    again.log({"score": 1.0}, step=6)
    again.close()
    assert len(list(folder.glob(f"wandb/offline-run-*-{run_id}/*.wandb"))) in (1, 2)
    assert capfd.readouterr() == ("", "")
