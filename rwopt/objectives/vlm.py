"""`vlm.*`: a vision-language model as a judge, asked over HTTP at an address of the user's.

Judges of 7 billion parameters and more need environments of their own (HPSv3, UnifiedReward, EditScore, any chat
model). A service of a few lines beside one answers this, once for each picture:

    POST <url>  {"image": <base64 of a PNG>, "prompt": <text or null>, "question": <text>,
                 "reference": <base64 of a PNG, or null>}
    200         {"score": <number>}      or null where there is nothing to judge

`vlm.alignment` asks how well a picture shows its prompt, `vlm.quality` how good it is, `vlm.edit` how well the prompt's
edit of the reference was done. Scores are brought from the service's scale, [low, high], to [0, 1]. Answers are kept in
a folder by picture, reference, prompt, question and address, so that a resumed or repeated run asks nothing twice.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.files import write_text
from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec
from rwopt.objectives.weights import options, scratch

# suffix -> (needs, the question, what it is)
_KINDS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "alignment": (("prompts",), "How well does the picture show what the prompt says?", "how well it fits the prompt"),
    "quality": ((), "How good is this picture, technically and to look at?", "how good the picture is"),
    "edit": (("prompts", "reference"), "The picture is an edit of the reference. How well was the prompt's change "
             "made, with all else kept?", "how well the edit was made and the rest kept"),
}  # fmt: skip

_DEFAULTS: dict[str, Any] = {
    "url": "", "question": "", "low": 0.0, "high": 1.0, "timeout": 60.0, "tries": 4, "wait": 0.5, "at_once": 4,
    "cache": "~/.cache/rwopt/vlm",
}  # fmt: skip


@dataclass(frozen=True)
class Service:
    """A judge at an address. tries: in all, for what may pass (no answer, 429, 5xx); between them `wait` seconds, then
    twice as many, and so on; timeout of one try in seconds; at_once: requests under way at a time."""

    url: str
    question: str
    low: float
    high: float
    timeout: float
    tries: int
    wait: float
    at_once: int
    cache: Path

    def __call__(self, images: Tensor, prompts: list[str] | None, reference: Tensor | None) -> Tensor:
        """Scores [N] from 0 to 1 of pictures [N, 3, H, W], NaN where the judge has nothing to judge."""
        texts: list[str | None] = [*prompts] if prompts else [None] * len(images)
        others: list[Tensor | None] = [None] * len(images) if reference is None else [*_bytes(reference)]
        with ThreadPoolExecutor(self.at_once) as pool:
            scores = list(pool.map(self.ask, _bytes(images), texts, others))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def ask(self, picture: Tensor, prompt: str | None, reference: Tensor | None) -> float:
        """Score of one picture [H, W, 3] of bytes. Raises `UserError` if the service gives none."""
        path = self._path(picture, prompt, reference)
        if path.is_file():
            return self._scaled(json.loads(path.read_text(encoding="utf-8"))["score"])
        image, other = (None if x is None else base64.b64encode(_png(x)).decode() for x in (picture, reference))
        score = self._answer({"image": image, "prompt": prompt, "question": self.question, "reference": other})
        scaled = self._scaled(score)
        write_text(path, json.dumps({"score": score, "url": self.url, "question": self.question, "prompt": prompt}))
        return scaled

    def _path(self, picture: Tensor, prompt: str | None, reference: Tensor | None) -> Path:
        digest = hashlib.sha256(json.dumps([self.url, self.question, prompt]).encode())
        for pixels in (picture, reference):
            if pixels is not None:
                digest.update(repr(tuple(pixels.shape)).encode())
                digest.update(pixels.numpy().tobytes())
        name = digest.hexdigest()
        return self.cache / name[:2] / f"{name[2:]}.json"

    def _answer(self, asked: Mapping[str, Any]) -> float | None:
        body = json.dumps(asked).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"}, method="POST")
        said = ""
        for i in range(self.tries):
            if i:
                time.sleep(self.wait * 2 ** (i - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return self._read(reply.read())
            except urllib.error.HTTPError as error:
                said = f"status {error.code}"
                if error.code != 429 and error.code < 500:
                    raise UserError(f"{self.url} refused a picture ({said}): see the log of that service") from None
            except (OSError, http.client.HTTPException) as error:  # no connection, a broken one, no answer in time
                said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{self.url} gave no score in {self.tries} tries ({said}): see that the service runs")

    def _read(self, body: bytes) -> float | None:
        try:
            score = json.loads(body)["score"]
        except (ValueError, KeyError, TypeError):
            score = body[:60]
        if score is None:
            return None
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise UserError(f'{self.url} answered {score!r}: the service must answer {{"score": number or null}}')
        return float(score)

    def _scaled(self, score: float | None) -> float:
        if score is None:
            return float("nan")
        if not self.low <= score <= self.high:
            raise UserError(f"{self.url} gave score {score}: set low and high to the ends of that service's scale")
        return (score - self.low) / (self.high - self.low)


def _bytes(images: Tensor) -> list[Tensor]:
    """Pictures [H, W, 3] of bytes, rounded."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte()
    return list(pixels.permute(0, 2, 3, 1).contiguous().cpu())


def _png(pixels: Tensor) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "PNG")
    return out.getvalue()


def specs() -> Mapping[str, ObjectiveSpec]:
    return {
        f"vlm.{kind}": ObjectiveSpec(
            f"vlm.{kind}", True, False, (0.0, 1.0), frozenset(needs), "that of the model behind your url",
            f"a vision-language model's word on {about}",
        )
        for kind, (needs, _, about) in _KINDS.items()
    }  # fmt: skip


def missing(name: str, **given: Any) -> str:
    """What is not there, in one line; "" if somebody listens at the address."""
    url = given.get("url", "")
    start = "start a service as rwopt.objectives.vlm describes and set the objective's option url to its address"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"objective {name} lacks its url{f', {url} is none' if url else ''}: {start}"
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=5).close()
    except (OSError, ValueError) as error:
        return f"objective {name}: nobody listens at {url} ({' '.join(str(error).split())}): {start}"
    return ""


def make(name: str, **given: Any) -> Objective:
    """The objective. Options:

    url: of the service; question: "" for the objective's own; low, high: ends of the service's scale; timeout: seconds
    of a try; tries: 1 or more; wait: seconds before the second try; at_once: requests under way at a time; cache:
    folder of answers. Raises `UserError` for an impossible option, and where nobody listens at the address.
    """
    chosen = options(name, given, _DEFAULTS)
    if not float("-inf") < chosen["low"] < chosen["high"] < float("inf"):
        raise UserError(f"objective {name}: low={chosen['low']} must be below high={chosen['high']}, both finite")
    for key, ok in (("tries", chosen["tries"] >= 1), ("at_once", chosen["at_once"] >= 1),
                    ("timeout", chosen["timeout"] > 0), ("wait", chosen["wait"] >= 0)):  # fmt: skip
        if not ok:
            raise UserError(f"objective {name}: {key}={chosen[key]} is too small: leave it out for {_DEFAULTS[key]}")
    absent = missing(name, **chosen)
    if absent:
        raise UserError(absent)
    question = chosen["question"] or _KINDS[name.split(".")[1]][1]
    cache = Path(chosen["cache"]).expanduser()
    service, spec = Service(**{**chosen, "question": question, "cache": cache}), specs()[name]

    def score(batch: Batch) -> Tensor:  # what it is not asked about is not sent, nor does it change what is kept
        prompts = batch.prompts if "prompts" in spec.needs else None
        return service(batch.images, prompts, batch.reference if "reference" in spec.needs else None)

    return Objective(spec, score)


def serve(judge: Callable[[Mapping[str, Any]], float | None]) -> ThreadingHTTPServer:
    """The smallest service, on a free port of this machine and in threads of this process, which `judge` answers for.

    judge: from the decoded request, whose pictures are bytes of PNGs, to a score. `shutdown` and `server_close` end it.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            pictures = {key: asked[key] and base64.b64decode(asked[key]) for key in ("image", "reference")}
            body = json.dumps({"score": judge({**asked, **pictures})}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Nothing: the address is asked hundreds of times."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    pause = 0.05  # seconds between two looks whether it is to end
    threading.Thread(target=server.serve_forever, args=(pause,), daemon=True).start()
    return server


def tiny(name: str) -> dict[str, Any]:
    """Options of a service on this machine that likes bright pictures."""
    return {"url": _bright(), "cache": str(scratch("vlm", _nothing))}


@lru_cache
def _bright() -> str:
    def judge(asked: Mapping[str, Any]) -> float:
        from PIL import Image, ImageStat

        return ImageStat.Stat(Image.open(io.BytesIO(asked["image"])).convert("L")).mean[0] / 255

    return f"http://127.0.0.1:{serve(judge).server_port}/"


def _nothing(_: Path) -> None:
    """Write nothing: the folder of answers starts empty."""
