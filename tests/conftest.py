"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from diffusers import UNet2DConditionModel
from helpers.small import hooks_of, make_tiny_unet

from rwopt.models import Model, load_model


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
