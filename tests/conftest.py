"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

# before torch is imported: matrix products are the same to the bit wherever in memory their operands lie, which some
# tests ask for; without it, on processors without AVX-512, weights that were read from a file give another last digit
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
from diffusers import UNet2DConditionModel
from helpers.small import hooks_of, make_tiny_unet

from rwopt import cli
from rwopt.models import Model, load_model


def pytest_collection_finish() -> None:
    """What was imported is no garbage: without it a full collection looks at 140 000 objects and not at 640 000."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def tiny_unet() -> UNet2DConditionModel:
    """A fresh one for each test (10 ms): tests hang hooks on it."""
    return make_tiny_unet()


@pytest.fixture(scope="session")
def loaded_avatars() -> Model:
    return load_model("avatars", device="cpu", dtype="float32")


@pytest.fixture
def avatars(loaded_avatars: Model) -> Iterator[Model]:
    """The embedded model in float32, loaded once. A test that leaves hooks on it fails, not one that comes later."""
    yield loaded_avatars
    assert not hooks_of(loaded_avatars.unet)
