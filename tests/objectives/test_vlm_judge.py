"""Judges over HTTP, asked of real servers on this machine: what they get, what is kept, and how they fail."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rwopt.errors import UserError
from rwopt.objectives import vlm
from rwopt.objectives.objective import Batch
from rwopt.objectives.vlm import make, serve, specs, tiny


def pictures(seed: int, n: int = 3) -> Tensor:
    return torch.rand(n, 3, 8, 10, generator=torch.Generator().manual_seed(seed))


@dataclass
class Judge:
    """A service that notes what it is asked; `score` answers."""

    score: Callable[[dict[str, Any]], Any] = lambda asked: 0.5
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def __call__(self, asked: Any) -> Any:
        self.asked.append(dict(asked))
        return self.score(dict(asked))


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    out = Judge()
    server = serve(out)
    monkeypatch.setattr(server, "handle_error", lambda *_: None)  # it prints when a client has gone
    out.url = f"http://127.0.0.1:{server.server_port}/score"
    yield out
    server.shutdown()
    server.server_close()


@pytest.fixture
def failing() -> Iterator[tuple[str, list[bytes], list[str]]]:
    """Address of a server that sends raw answers, one after the other, the last for ever; and what it saw."""
    answers, seen = [b""], list[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(answers.pop(0) if len(answers) > 1 else answers[0])

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", answers, seen
    server.shutdown()
    server.server_close()


def answer(status: str, body: str = "") -> bytes:
    return f"HTTP/1.0 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def brightness(asked: dict[str, Any]) -> float:
    return float(np.array(Image.open(io.BytesIO(asked["image"]))).mean() / 255)


def test_scores_come_in_the_order_of_the_pictures(judge: Judge, tmp_path: Path) -> None:
    def slowly(asked: dict[str, Any]) -> float:
        time.sleep(0.02 * brightness(asked))
        return brightness(asked)

    judge.score = slowly
    images = torch.linspace(1, 0, 9).reshape(9, 1, 1, 1).expand(9, 3, 8, 10)
    scores = make("vlm.quality", url=judge.url, cache=str(tmp_path))(Batch(images))
    torch.testing.assert_close(scores, torch.linspace(1, 0, 9), atol=1 / 500, rtol=0)


def test_what_a_service_gets(judge: Judge, tmp_path: Path) -> None:
    images, reference = pictures(1, 1), pictures(2, 1)
    batch = Batch(images, reference=reference, prompts=["a fox, größer"])
    make("vlm.edit", url=judge.url, cache=str(tmp_path), question="Well?")(batch)
    (asked,) = judge.asked
    assert asked["prompt"] == "a fox, größer"
    assert asked["question"] == "Well?"
    for key, pixels in (("image", images), ("reference", reference)):
        seen = torch.from_numpy(np.array(Image.open(io.BytesIO(asked[key])))).permute(2, 0, 1) / 255
        assert (seen - pixels[0]).abs().max() <= 0.5001 / 255
    for name in ("vlm.quality", "vlm.alignment"):  # these are not told what they do not judge
        make(name, url=judge.url, cache=str(tmp_path))(batch)
    assert [(a["prompt"], a["reference"]) for a in judge.asked[1:]] == [(None, None), ("a fox, größer", None)]
    assert len({a["question"] for a in judge.asked}) == 3


def test_nothing_is_asked_twice(judge: Judge, tmp_path: Path) -> None:
    judge.score = brightness
    batch = Batch(pictures(1), reference=pictures(2), prompts=["a", "b", "c"])
    given: dict[str, Any] = {"url": judge.url, "cache": str(tmp_path)}
    first = make("vlm.edit", **given)(batch)
    assert len(judge.asked) == 3
    assert torch.equal(make("vlm.edit", **given)(batch), first)
    assert len(judge.asked) == 3
    one = replace(batch, images=batch.images.clone())
    one.images[1, 0, 0, 0] += 2 / 255
    for i, (case, more) in enumerate([(one, {}), (replace(batch, prompts=["a", "b", "d"]), {}),
                                      (replace(batch, reference=pictures(3)), {}),
                                      (batch, {"question": "?"}), (batch, {"url": judge.url + "2"})]):  # fmt: skip
        before = len(judge.asked)
        make("vlm.edit", **{**given, **more})(case)
        assert len(judge.asked) - before == [1, 1, 3, 3, 3][i]
    assert all(json.loads(path.read_text())["score"] <= 1 for path in tmp_path.rglob("*.json"))


def test_scales_are_brought_to_one(judge: Judge, tmp_path: Path) -> None:
    judge.score = lambda asked: 4
    given: dict[str, Any] = {"url": judge.url, "cache": str(tmp_path)}
    assert make("vlm.quality", **given, low=1, high=5.0)(Batch(pictures(1))).tolist() == [0.75] * 3
    with pytest.raises(UserError, match=r"gave score 4\.0: set low and high to the ends of that service's scale$"):
        make("vlm.quality", **given)(Batch(pictures(1)))
    with pytest.raises(UserError, match=r"gave score 4\.0"):
        make("vlm.quality", **given)(Batch(pictures(5)))


def test_nothing_to_judge_is_nan_and_kept(judge: Judge, tmp_path: Path) -> None:
    judge.score = lambda asked: None
    for _ in range(2):
        assert make("vlm.quality", url=judge.url, cache=str(tmp_path))(Batch(pictures(1))).isnan().all()
    assert len(judge.asked) == 3


@pytest.mark.parametrize("passing", ["500 Oops", "503 Busy", "429 Too Many Requests", "nothing", "rubbish"])
def test_what_passes_is_tried_again(passing: str, failing: Any, tmp_path: Path) -> None:
    url, answers, seen = failing
    bad = {"nothing": b"", "rubbish": b"HTTP/9 hello\r\n"}.get(passing, answer(passing))
    answers[:] = [bad, bad, answer("200 OK", '{"score": 0.25}')]
    start = time.monotonic()
    scores = make("vlm.quality", url=url, cache=str(tmp_path), wait=0.02)(Batch(pictures(1, 1)))
    assert scores.tolist() == [0.25]
    assert len(seen) == 3
    assert time.monotonic() - start >= 0.06  # 0.02, then twice as long


def test_what_does_not_pass_ends_in_one_line(failing: Any, tmp_path: Path) -> None:
    url, answers, seen = failing
    given: dict[str, Any] = {"url": url, "cache": str(tmp_path), "tries": 3, "wait": 0.0}
    cases = [
        (answer("500 Oops"), 3, r"gave no score in 3 tries \(status 500\): see that the service runs$"),
        (answer("404 Not Found"), 1, r"refused a picture \(status 404\): see the log of that service$"),
        (answer("200 OK", "fine"), 1, r"answered b'fine': the service must answer \{\"score\": number or null\}$"),
        (answer("200 OK", '{"points": 1}'), 1, r"answered b'\{\"points\": 1\}': the service must"),
        (answer("200 OK", '{"score": "1"}'), 1, r"answered '1': the service must answer"),
        (answer("200 OK", '{"score": true}'), 1, r"answered True: the service must answer"),
        (answer("200 OK", '{"score": NaN}'), 1, r"gave score nan: set low and high"),
        (answer("200 OK", "[1]"), 1, r"answered b'\[1\]': the service must"),
    ]
    for raw, tries, message in cases:
        answers[:], seen[:] = [raw], []
        with pytest.raises(UserError, match=message) as caught:
            make("vlm.quality", **given)(Batch(pictures(1, 1)))
        assert "\n" not in str(caught.value)
        assert len(seen) == tries
    assert not list(tmp_path.rglob("*.json"))  # failures are not kept


def test_a_service_that_hangs_is_given_up(judge: Judge, tmp_path: Path) -> None:
    release = threading.Event()
    judge.score = lambda asked: release.wait(5) and 0.5
    given: dict[str, Any] = {"url": judge.url, "cache": str(tmp_path), "timeout": 0.1, "tries": 2, "wait": 0.0}
    start = time.monotonic()
    with pytest.raises(UserError, match=r"gave no score in 2 tries \(timed out\)"):
        make("vlm.quality", **given)(Batch(pictures(1, 1)))
    assert time.monotonic() - start < 3
    release.set()


def test_it_has_no_gradient(judge: Judge, tmp_path: Path) -> None:
    images = pictures(1).requires_grad_()
    assert not make("vlm.quality", url=judge.url, cache=str(tmp_path))(Batch(images)).requires_grad
    assert not any(spec.differentiable for spec in specs().values())


def test_nobody_at_the_address_is_told_before_the_first_picture(judge: Judge) -> None:
    assert vlm.missing("vlm.quality", url=judge.url) == ""
    for url, message in (("", r"^objective vlm\.quality lacks its url: start a service"),
                         ("localhost:80", r"lacks its url, localhost:80 is none: "),
                         ("http://127.0.0.1:9/", r"nobody listens at http://127\.0\.0\.1:9/ \(.*refused\): start"),
                         ("http://x:port/", r"nobody listens at http://x:port/ \(")):  # fmt: skip
        with pytest.raises(UserError, match=message) as caught:
            make("vlm.quality", url=url)
        assert str(caught.value) == vlm.missing("vlm.quality", url=url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 1.0}, r"low=1\.0 must be below high=1\.0"),
        ({"high": float("inf")}, r"must be below high=inf, both finite"),
        ({"tries": 0}, r"tries=0 is too small: leave it out for 4"),
        ({"timeout": 0.0}, r"timeout=0\.0 is too small"),
        ({"tries": 1.5}, r"has tries=1\.5: give a whole number"),
        ({"adress": ""}, r"vlm\.quality has no option adress"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str, judge: Judge) -> None:
    with pytest.raises(UserError, match=message):
        make("vlm.quality", **{"url": judge.url, **options})


def test_the_smallest_service_likes_bright_pictures() -> None:
    batch = Batch(torch.stack([torch.full((3, 8, 8), x) for x in (0.2, 0.8)]))
    assert make("vlm.quality", **tiny("vlm.quality"))(batch).tolist() == pytest.approx([0.2, 0.8])
