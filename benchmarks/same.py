"""Whether two run folders of `rwopt search` hold the same numbers: `python benchmarks/same.py RUN RUN`.

For a change that must change nothing: run the same recipe before and after it, then compare. Compares the schedule's
digest and weights, each arm's dials, weights, evaluations and U-Net calls, every test score and every probe score,
all to the last bit; exit status 1 and a line a difference where there is one. What only says where and how a run was
made (command, versions) is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwopt.schedule import Schedule

LEFT_OUT = {"provenance"}
FILES = ("arms/*.json", "importance.json", "votes.json", "gradient_norms.json", "slope.json", "gram.json")


def differences(a: Any, b: Any, where: str) -> Iterator[str]:
    """A line for each place in which two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b} - LEFT_OUT):
            yield from differences(a.get(key), b.get(key), f"{where}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{where}[{i}]")
    elif a != b:
        yield f"{where}: {a!r} and {b!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    one, two = parser.parse_args().runs
    found: list[str] = []
    names = {path.relative_to(run) for run in (one, two) for glob in FILES for path in run.glob(glob)}
    for name in sorted(names):
        if not ((one / name).exists() and (two / name).exists()):
            found.append(f"{name}: in one run only")
            continue
        found += differences(*(json.loads((run / name).read_text()) for run in (one, two)), str(name))
    first, second = (Schedule.load(run / "schedule.json") for run in (one, two))
    if first.digest() != second.digest():
        found.append(f"schedule.json: {first.digest()} and {second.digest()}")
    tested = [json.loads((one / name).read_text()) for name in names if name.name.endswith(".test.json")]
    scores = sum(len(column) for table in tested for column in table.values())
    print(f"{len(names)} files, {scores} test scores, schedule {first.digest()[:16]}: {len(found)} differences")
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
