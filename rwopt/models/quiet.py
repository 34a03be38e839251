"""Diffusers and transformers without progress bars and talk."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, both log nothing: their errors are raised, and what else is worth a word to the user, rwopt says itself.
    Bars stay off afterwards.

    Nor are there warnings of arguments that newer versions call otherwise (`torch_dtype`): older ones know no other.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(talk, talk.get_verbosity()) for talk in (diffusers_logging, transformers_logging)]
    for talk, _ in before:
        talk.disable_progress_bar()
        talk.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for talk, level in before:
            talk.set_verbosity(level)
