"""The Hub's folder: there and back, the card, and pushes against a stand-in of the Hub's API on this machine."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.hub import Hub
from rwopt.schedule.steps import Steps

Shared: Any = Schedule if issubclass(Schedule, Hub) else type("Shared", (Schedule, Hub), {})
SITES = ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.resnets.2.skip")


def some(**fields: Any) -> Any:
    weights = np.array([[1.25, 0.9, 1 / 3], [1.0, 1.1, 2.0]])
    made = {"objective": {"image.reward": 1.0}, "validation": 0.4213, "evaluations": 80, "seed": 3}
    return Shared(SITES, np.array([9.0, 0.7]), weights, **{
        "model": {"base_model": "some/model", "family": "sd15"}, "provenance": made,
        "calibrated": {"task": "generation", "num_inference_steps": 4}, **fields,
    })  # fmt: skip


def test_a_folder_is_a_schedule_again(tmp_path: Path) -> None:
    schedule = some(steps=Steps("ddim", (9, 1)), extra={"x-mine": 1})
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        written = schedule.save_pretrained(tmp_path)
    assert {path.name for path in written} == {"schedule.json", "README.md", "schedule.png"}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    for place in (tmp_path, str(tmp_path), tmp_path / "schedule.json"):
        again = Shared.from_pretrained(place)
        assert again == schedule
        assert isinstance(again, Shared)
    assert {path.name for path in tmp_path.iterdir()} == {"schedule.json", "README.md", "schedule.png", "notes.txt"}


def test_the_card_is_what_the_hub_reads(tmp_path: Path) -> None:
    some(steps=Steps("ddim", (9, 1))).save_pretrained(tmp_path, license="apache-2.0", name="me/weights")
    read = ModelCard.load(tmp_path / "README.md")
    data = read.data.to_dict()
    assert (data["base_model"], data["license"], data["library_name"]) == ("some/model", "apache-2.0", "rwopt")
    assert {"rwopt", "weight-schedule", "sd15"} <= {*data["tags"]}
    for line in ("| validation | 0.4213 |", "| objective | image.reward 1 |", "| num inference steps | 4 |",
                 'rwopt.Schedule.from_pretrained("me/weights")', "2 calls of ddim", "(schedule.png)"):  # fmt: skip
        assert line in read.text
    code = read.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    with Image.open(tmp_path / "schedule.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 600
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_the_card_shows_nobodys_folders_and_keeps_to_its_cells(tmp_path: Path) -> None:
    wild = {"objective": "a|b\n# c <script>`x`", "command": "/home/me/secret", "seed": None}
    some(model={"base_model": "/home/me/model", "family": "a b"}, provenance=wild).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "/home/me" not in text
    assert "base_model" not in text
    assert r"| objective | a\|b # c \<script\>\`x\` |" in text
    assert "| seed" not in text
    bare = some(model={}, provenance={}, calibrated={})
    bare.save_pretrained(tmp_path)
    assert "## " not in (tmp_path / "README.md").read_text()


def test_many_sites_are_drawn(tmp_path: Path) -> None:
    names = [f"up_blocks.{i}.attentions.0" for i in range(250)]
    Shared.constant(names, np.linspace(9, 1, 30), 0.0).save_pretrained(tmp_path)
    with Image.open(tmp_path / "schedule.png") as image:
        assert image.height < 5000


def test_what_is_no_schedule_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").write_text("x")
    cases: list[tuple[Any, str]] = [
        (lambda: Shared.from_pretrained(tmp_path), "schedule.json: cannot be read"),
        (lambda: Shared.from_pretrained(tmp_path / "file"), "is not JSON"),
        (lambda: Shared.from_pretrained("./no where"), "is no folder or file, and no id of the Hub"),
        (lambda: Shared.from_pretrained("me/absent", cache_dir=tmp_path / "cache"), "me/absent: cannot be fetched"),
        (lambda: some().save_pretrained(tmp_path / "file"), "is a file: give a folder"),
        (lambda: some().push_to_hub("weights"), "repo_id=weights: give owner/name"),
        (lambda: some().push_to_hub("me/weights", token="x"), "me/weights: cannot be written on the Hub"),
    ]
    for act, says in cases:
        with pytest.raises(UserError, match=says) as error:
            act()
        assert "\n" not in str(error.value)


class StandIn(BaseHTTPRequestHandler):
    """The few calls of the Hub's API that a push and a fetch make, with what they commit kept in memory."""

    files: dict[str, bytes]
    calls: list[tuple[str, str, Any]]
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        lines = [json.loads(line) for line in body.splitlines()]
        self.calls.append((self.path, self.headers.get("authorization", ""), lines))
        made: dict[str, Any] = {"warnings": [], "errors": []}
        if self.headers.get("authorization") != "Bearer secret":
            self.answer(401, b'{"error": "Invalid username or password."}')
            return
        if self.path == "/api/repos/create":
            made = {"url": f"http://{self.headers['host']}/me/weights", "name": "me/weights"}
        elif "/preupload/" in self.path:
            common = {"uploadMode": "regular", "shouldIgnore": False}
            made = {"files": [{"path": file["path"], **common} for file in lines[0]["files"]]}
        elif "/commit/" in self.path:
            for line in lines[1:]:
                assert line["key"] == "file"
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            made = {"commitUrl": f"http://{self.headers['host']}/me/weights/commit/{'a' * 40}", "commitOid": "a" * 40}
        self.answer(200, json.dumps(made).encode(), content_type="application/json")

    def do_GET(self) -> None:
        owner, _, rest = self.path.lstrip("/").partition("/resolve/main/")
        if owner != "me/weights":
            self.answer(404, b"", x_error_code="RepoNotFound")
        elif rest not in self.files:
            self.answer(404, b"", x_error_code="EntryNotFound")
        else:
            self.answer(200, self.files[rest], etag='"e"', x_repo_commit="a" * 40)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[StandIn]]]:
    kind = type("Own", (StandIn,), {"files": {}, "calls": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", kind
    server.shutdown()
    server.server_close()


SCRIPT = """
import sys
from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.hub import Hub
Shared = Schedule if issubclass(Schedule, Hub) else type("Shared", (Schedule, Hub), {})
schedule = Shared.from_pretrained(sys.argv[1])
print(schedule.push_to_hub("me/weights", token="secret", license="mit", private=True))
assert Shared.from_pretrained("me/weights", token="secret", revision="main") == schedule
for act in (lambda: Shared.from_pretrained("me/absent"), lambda: schedule.push_to_hub("me/weights", token="wrong")):
    try:
        act()
    except UserError as error:
        print(str(error).replace(chr(10), "LINE BREAK"))
assert "torch" not in sys.modules
"""


def test_a_push_commits_the_files_and_they_come_back(tmp_path: Path, hub: tuple[str, type[StandIn]]) -> None:
    """In a process of its own: `huggingface_hub` takes the Hub's address from the environment when it is imported."""
    address, kind = hub
    schedule = some()
    schedule.save_pretrained(tmp_path / "local", license="mit", name="me/weights")
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HOME": str(tmp_path), "NO_PROXY": "*",
                   "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "local")], env=environment, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    pushed, absent, wrong = done.stdout.splitlines()
    assert pushed == f"{address}/me/weights/commit/{'a' * 40}"
    assert absent.startswith("me/absent: cannot be fetched from the Hub (")
    assert wrong.startswith("me/weights: cannot be written on the Hub (")
    assert kind.files == {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    created = next(lines for path, _, lines in kind.calls if path == "/api/repos/create")
    assert created[0].items() >= {"name": "weights", "organization": "me"}.items()
    assert True in (created[0].get("private"), created[0].get("visibility") == "private")
    commit = next(lines for path, _, lines in kind.calls if path == "/api/models/me/weights/commit/main")
    assert commit[0]["value"]["summary"] == "Schedule of block weights"
    assert [line["value"]["path"] for line in commit[1:]] == sorted(kind.files)


def test_notes_are_not_lost_by_a_subclass() -> None:
    assert replace(some(), interp="nearest").interp == "nearest"
