"""Kill a search at random moments, resume it, and count. Run: `python benchmarks/resume.py [--kills 5] [--seed 0]`.

A tiny search of the embedded model is killed with SIGKILL. After each kill every file must be whole; the last run must
end with exactly the trials that were asked for. Writes `benchmarks/results/resume.json`. About 3 minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent / "tests"))

from helpers.tiny import SETTINGS, STUDIES, killed_search  # noqa: E402

from rwopt.files import write_text  # noqa: E402
from rwopt.search.identity import versions  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within", type=float, default=5.0, help="latest moment of a kill, in seconds of work")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        seen = killed_search(folder, ["recipe=editing", *SETTINGS], args.kills, args.seed, args.within)
        complete = (folder / "report.html").exists() and (folder / "schedule.json").exists()
        left = len(list(folder.rglob(".*.tmp")))
    del seen["output"]
    result = {
        "command": f"python benchmarks/resume.py --kills {args.kills} --seed {args.seed} --within {args.within:g}",
        "killed": sum(bool(kill["killed"]) for kill in seen["kills"]),  # type: ignore[attr-defined]
        "complete": complete,
        "temporary_files_left": left,
        "trials_exact": seen["trials"] == STUDIES,
        "trials_asked": STUDIES,
        **seen,
        "seconds": round(time.monotonic() - began),
        "versions": versions(),
    }
    write_text(ROOT / "results" / "resume.json", json.dumps(result, indent=1) + "\n")
    for kill in result["kills"]:
        what = "killed" if kill["killed"] else "had finished"
        count = f"{kill['files']} whole files, {kill['scored_trials']} scored trials"
        print(f"{what} after {kill['seconds']:5.2f} s: {count}")
    print(f"final run complete: {complete}; trials of each study exact: {result['trials_exact']} {result['trials']}")
    return 0 if complete and result["trials_exact"] and not left else 1


if __name__ == "__main__":
    sys.exit(main())
