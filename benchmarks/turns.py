"""Two runs of a sampler timed call by call in turns, so that both meet what else the machine does."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore
from typing import Any

from torch import Tensor

from rwopt.unet.cost import Watch

Times = list[tuple[list[float], list[float]]]
"""Of each round the seconds of each call of the first run, and of the second."""
MANY = 1000  # calls


class Turn:
    """Of two threads, one of which works at a time."""

    def __init__(self) -> None:
        self._free = Semaphore(0)
        self.other = self

    @classmethod
    def two(cls) -> tuple[Turn, Turn]:
        first, second = cls(), cls()
        first.other, second.other = second, first
        first._free.release()
        return first, second

    def take(self, work: Callable[[Turn], list[float]]) -> list[float]:
        self._free.acquire()
        try:
            return work(self)
        finally:
            self.other._free.release(MANY)  # also after an error

    def pass_on(self) -> None:
        self.other._free.release()
        self._free.acquire()


class Clock:
    """A callback of `sample`: reads the time of each call and passes the turn on after it."""

    def __init__(self, watch: Watch, turn: Turn) -> None:
        self.watch, self.turn = watch, turn
        self._seconds: list[float] = []
        self._begin: Any = None

    def __call__(self, i: int, x: Tensor) -> None:
        if i:
            self._end()
        self._begin = self.watch.now()

    def of_calls(self) -> list[float]:
        """Seconds of each, once the sampler is at its end."""
        self._end()
        return self._seconds

    def _end(self) -> None:
        self._seconds.append(self.watch.seconds(self._begin, self.watch.now()))
        self.turn.pass_on()


def in_turns(first: Callable[[Turn], list[float]], second: Callable[[Turn], list[float]], rounds: int) -> Times:
    """Both runs `rounds` times, after one of each in which kernels are chosen."""
    found: Times = []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(rounds + 1):
            runs = [pool.submit(turn.take, work) for turn, work in zip(Turn.two(), (first, second), strict=True)]
            found.append((runs[0].result(), runs[1].result()))
    return found[1:]


def alike(times: Times) -> float:
    """The first run over the second of as many calls: of each call the median ratio, and their mean."""
    ratios = [[a / b for a, b in zip(*pair, strict=True)] for pair in times]
    return statistics.mean(map(statistics.median, zip(*ratios, strict=True)))


def unlike(times: Times) -> float:
    """The first run over the second of another number of calls: sums of each call's median."""
    first, second = (sum(map(statistics.median, zip(*runs, strict=True))) for runs in zip(*times, strict=True))
    return first / second
