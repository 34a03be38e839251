"""Weights: found in files, folders and the hub's cache; another file, other keys and other shapes are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rwopt.errors import UserError
from rwopt.objectives import weights
from rwopt.objectives.weights import ANY, Source, filled, in_bytes, options, pretrained, read_state, tokenizer

FILE = Source("checkpoint", "some/repository", "net.pt", "MIT", 1_790_000_000)
FOLDER = Source("model", "some/model", "config.json", "MIT", 346_000_000, folder=True)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's client with an empty cache and no network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "_SILENT", set())
    weights._on_hub.cache_clear()


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_says_what_to_fetch_and_which_option_to_set(tmp_path: Path) -> None:
    assert FILE.missing("x") == (
        "objective x lacks its checkpoint: download net.pt of some/repository (MIT, 1.79 GB) and set the objective's "
        "option checkpoint to that file"
    )
    assert FOLDER.missing("x", str(tmp_path)) == (
        f"objective x lacks its model, {tmp_path} is no folder with config.json and no hub id with it: download all "
        "files of some/model (MIT, 346 MB) and set the objective's option model to that folder"
    )
    with pytest.raises(UserError, match=r"^objective x lacks its checkpoint, no\.pt is no file") as caught:
        FILE.find("x", "no.pt")
    one_line(caught)


def test_files_and_folders_are_found(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    assert FILE.find("x", str(tmp_path / "net.pt")) == str(tmp_path / "net.pt")
    assert FILE.find("x", str(tmp_path)) == str(tmp_path / "net.pt")
    assert FOLDER.find("x", str(tmp_path)) == str(tmp_path)
    assert FOLDER.missing("x", str(tmp_path / "config.json"))  # a file is no folder


def test_one_place_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path.parent)
    assert FOLDER.find("x", tmp_path.name) == FOLDER.find("x", str(tmp_path)) == str(tmp_path)


def test_a_download_that_breaks_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_on_hub", lambda place, file: True)  # it was there a moment ago
    with pytest.raises(UserError, match=r"^objective x: net\.pt of some/repository cannot be downloaded \(") as caught:
        FILE.find("x")
    one_line(caught)


def test_the_hubs_cache_is_enough(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--some--repository"
    commit = "0123456789" * 4
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "net.pt").write_bytes(b"weights")
    assert FILE.missing("x") == ""
    assert Path(FILE.find("x")).read_bytes() == b"weights"


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    known = Source("checkpoint", "some/repository", "net.pt", "MIT", 7, digest[:8])
    assert known.checked("x", str(path)) == (str(path), digest)
    assert FILE.checked("x", str(path)) == (str(path), digest)
    for wanted in (digest, digest[:10].upper(), ANY):
        assert FILE.checked("x", str(path), wanted)[1] == digest
    path.write_bytes(b"other")
    with pytest.raises(UserError, match=rf"has sha256 \w{{64}}, not {digest[:8]}: download net\.pt of so") as caught:
        known.checked("x", str(path))
    assert ANY in one_line(caught)
    assert known.checked("x", str(path), ANY)[0] == str(path)


@pytest.mark.parametrize("kind", ["pt", "safetensors", "wrapped"])
def test_tables_of_weights_are_read(kind: str, tmp_path: Path) -> None:
    state, path = {"a": torch.arange(3.0)}, tmp_path / f"x.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if kind == "wrapped" else state, path)
    assert torch.equal(read_state(str(path))["a"], state["a"])


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched-by-a-pickle"),)


@pytest.mark.parametrize("content", ["text", "pickle", "list", "short"])
def test_what_is_no_table_of_weights_is_refused_and_not_run(content: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.safetensors" if content == "short" else "x.pt")
    if content in ("pickle", "list"):
        torch.save(Evil() if content == "pickle" else [torch.ones(1)], path)
    else:
        path.write_text("<html>404</html>")
    with pytest.raises(UserError, match=r"is no (file|table) of weights") as caught:
        read_state(str(path))
    one_line(caught)
    assert not Path("touched-by-a-pickle").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "f lacks bias: it is of another network, give the published weights"),
        ({"more": torch.ones(1), "most": torch.ones(1)}, "f has too much more and 1 more: it is"),
        ({"weight": torch.ones(3, 1)}, "f has other shapes of weight: it is"),
    ],
)
def test_all_keys_must_fit(change: dict[str, Any], message: str) -> None:
    state = {key: v for key, v in {**nn.Linear(2, 3).state_dict(), **change}.items() if v is not None}
    with pytest.raises(UserError) as caught:
        filled(nn.Linear(2, 3), "f", state)
    assert one_line(caught).startswith(message)


def test_tables_that_are_no_weights_do_not_count() -> None:
    network, state = nn.Linear(2, 3), nn.Linear(2, 3).half().state_dict()
    filled(network, "f", {**state, "deep.position_ids": torch.arange(4)})
    assert torch.equal(network.weight, state["weight"].float())


def test_transformers_fills_up_nothing_at_random(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    thin = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = ViTModel(ViTConfig(**thin, image_size=16, patch_size=8), add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    loaded = pretrained(ViTModel, str(tmp_path), add_pooling_layer=False)
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match=r"lacks pooler\.dense\.bias and 1 more"):
        pretrained(ViTModel, str(tmp_path), add_pooling_layer=True)
    config, state = model.config, dict(model.state_dict())
    more = {**state, "more": torch.ones(1)}
    with pytest.raises(UserError, match=r"here has too much more: "):
        pretrained(ViTModel, "here", config=config, state_dict=more, add_pooling_layer=False)
    state["layernorm.bias"] = torch.ones(3)
    with pytest.raises(UserError, match=r"here has other shapes of layernorm\.bias: "):
        pretrained(ViTModel, "here", config=config, state_dict=state, add_pooling_layer=False)


def test_places_that_hold_nothing_are_named(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be opened as CLIPModel \(") as caught:
        pretrained(CLIPModel, str(tmp_path))
    one_line(caught)
    with pytest.raises(UserError, match=r"holds no tokenizer \(") as caught:
        tokenizer(AutoTokenizer, str(tmp_path))
    one_line(caught)


def test_options_are_known_and_of_the_right_kind() -> None:
    defaults = {"url": "", "low": 0.0, "tries": 3}
    assert options("x", {"low": 1, "tries": 2}, defaults) == {"url": "", "low": 1, "tries": 2}
    with pytest.raises(UserError, match=r"x has no option uri: it takes url, low, tries"):
        options("x", {"uri": "a"}, defaults)
    for wrong in ({"url": 3}, {"low": "0"}, {"low": True}, {"tries": 2.0}):
        with pytest.raises(UserError, match=r"^objective\.options: x has \w+=\S+: give a [a-z ]+$"):
            options("x", wrong, defaults)


def test_sizes_for_people() -> None:
    sizes = (1_710_000_000, 346_000_000, 3_714_759, 3_871)
    assert [in_bytes(n) for n in sizes] == ["1.71 GB", "346 MB", "3.71 MB", "4 kB"]
