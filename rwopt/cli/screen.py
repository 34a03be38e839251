"""What goes to the screen beside a verb's own output."""

from __future__ import annotations

import os
import sys


def quiet() -> None:
    """Keep other libraries' start-up chatter off the screen; their errors still show."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
