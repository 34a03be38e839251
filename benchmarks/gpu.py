"""What a schedule, a gradient and a search cost on this GPU, in five minutes.

`python benchmarks/gpu.py [--small] [--only PART ...] [--seconds 280] [--out FILE]`. True architectures of Stable
Diffusion 1.5 (512 x 512) and XL (1024 x 1024) with random weights in float16. Parts:

- sites: tensor operations of a U-Net call, host synchronisations and wall clock of a picture, for each kind of site
  and FreeU, at a small and a large batch; in each round every method makes a picture, in random order;
- kernels: what the GPU runs in a call, and its milliseconds, by the profiler;
- gradient: seconds and peak memory of an update of a gradient search, with a VAE of true architecture;
- search: `rwopt search recipe=editing` with small limits;
- compile: `torch.compile` in three modes: graphs, recompilations, wall clock, agreement, another schedule. Compilers
  are slow: `--only compile --seconds 900` has time for all.

Each is measured in processes of its own with its share of the time, so what fails, needs more memory than there is or
takes too long is recorded as such, and the rest goes on; what the processes say goes to `lightning_logs/bench-gpu/`.
Numbers go to `benchmarks/results/gpu.json`, the tables to `docs/apply.md`; with `--only`, other parts of the same card
and versions stay. `--small`: small U-Nets on any device, in a minute, to `gpu-quick.json`, which is no evidence and not
kept. `--out`: another file, with the logs beside it, and the docs stay as they are.
"""

from __future__ import annotations

import os

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # importing must not touch CUDA: processes are forked

import argparse
import json
import multiprocessing
import shlex
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_parts
import torch
from comparison import ROOT, into, publish
from gpu_bench import METHODS, PLAIN, Place, reason

from rwopt.files import write_text
from rwopt.search.identity import versions

Row = dict[str, Any]
LOGS = ROOT.parent / "lightning_logs" / "bench-gpu"
LEAST = 8.0  # seconds under which nothing is begun
GRACE = 10.0  # seconds by which one may be late, at the cost of the next


@dataclass(frozen=True)
class Unit:
    """What a process does: a function of `gpu_parts`, named like its part, and its share of the time.

    What one leaves over goes to those after it.
    """

    part: str
    arguments: tuple[str, ...] = ()
    share: float = 0.0

    @property
    def name(self) -> str:
        return ", ".join((self.part, *self.arguments))


PARTS = ("sites", "kernels", "gradient", "search", "compile")
UNITS = [
    Unit("sites", ("SD1.5",), 0.10),
    Unit("sites", ("SDXL",), 0.16),
    Unit("kernels", ("SD1.5",), 0.05),
    Unit("kernels", ("SDXL",), 0.08),
    Unit("gradient", ("SD1.5",), 0.12),
    Unit("gradient", ("SDXL",), 0.09),
    Unit("search", (), 0.08),
    Unit("compile", ("SD1.5", "reduce-overhead", "all kinds"), 0.32),  # the others take what it leaves
    Unit("compile", ("SD1.5", "default", "all kinds")),
    Unit("compile", ("SDXL", "reduce-overhead", "transformers")),
    Unit("compile", ("SD1.5", "max-autotune", "all kinds")),
]


def units(only: list[str], cuda: bool) -> list[Unit]:
    """Without a GPU `torch.compile` has no modes: what it traces runs as it is."""
    eager = Unit("compile", ("SD1.5", "eager", "all kinds"), 0.30)
    chosen = UNITS if cuda else [*(unit for unit in UNITS if unit.part != "compile"), eager]
    return [unit for unit in chosen if unit.part in only]


# --- processes


def work(unit: Unit, place: Place, rows: Path, log: Path) -> None:
    """In a process of its own: each row is a line of `rows`."""
    sys.stdout.flush()
    with log.open("w") as said:
        for number in (1, 2):
            os.dup2(said.fileno(), number)
    if not place.cuda:
        torch.set_num_threads(1)
    with rows.open("a", buffering=1) as out:
        try:
            for row in getattr(gpu_parts, unit.part)(place, *unit.arguments):
                out.write(json.dumps(row) + "\n")
        except Exception as error:
            traceback.print_exc()
            out.write(json.dumps({"error": reason(error)}) + "\n")
        sys.stdout.flush()
        sys.stderr.flush()


def measure(unit: Unit, place: Place, fork: str, logs: Path) -> list[Row]:
    """The rows of a unit. If it did not end well, one of them is `{"error": why}` and nothing else."""
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{'-'.join(unit.name.replace(',', '').split())}.log"
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        rows.touch()
        begun = time.monotonic()
        process = multiprocessing.get_context(fork).Process(target=work, args=(unit, place, rows, log))
        process.start()
        late, patience = False, 2 if unit.part == "compile" else GRACE
        while process.is_alive() and not late:
            process.join(0.2)
            late = place.left < -patience
            found += _new(rows, len(found), unit.part)
        if late:
            process.kill()
        process.join()
        found += _new(rows, len(found), unit.part)
    if late:
        found.append({"error": f"stopped after {time.monotonic() - begun:.0f} s, its share of the time"})
    elif process.exitcode:
        found.append({"error": f"its process ended with {process.exitcode}: {_last(log)}"})
    return found


def _new(file: Path, known: int, part: str) -> list[Row]:
    """Whole lines that came since, which are shown unless there is nothing in them."""
    rows: list[Row] = [json.loads(line) for line in file.read_text().split("\n")[:-1][known:]]
    for row in rows:
        rest = [f"{key} {value}" for key, value in row.items() if key not in WHOSE and value is not None]
        if rest and part in PARTS:
            print(f"{part}, {_whose(row)}: {', '.join(rest)}", flush=True)
    return rows


def _last(log: Path) -> str:
    return log.read_text(errors="replace").strip().split("\n")[-1][:200] or "no message"


# --- tables


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(r) + " |" for r in rows), ""]


def number(value: Any, form: str = "g", lacking: str = "-") -> str:
    return lacking if value is None else format(value, form)


def wall(row: Row) -> str:
    return "-" if row.get("ratio") is None else "{ratio:.3f} [{low:.3f}, {high:.3f}] ({rounds})".format(**row)


def markdown(result: Row) -> str:
    """What `docs/apply.md` shows."""
    lines = [*_costs(result), *_compiled(result.get("compile", [])), *_gradients(result.get("gradient", []))]
    for row in (row for row in result.get("search", []) if "seconds" in row):
        end = f"exit code {row['exit_code']}, schedule {'written' if row['schedule'] else 'missing'}"
        lines += [f"`{row['command']}` with small limits: {row['seconds']} s, {end}.", ""]
    rows = [(part, row) for part in PARTS for row in result.get(part, []) if "error" in row]
    failed = [f"{part}, {_whose(row)}: {row['error']}" for part, row in rows]
    failed += [f"{note['unit']}: {note['reason']}" for note in result["notes"]]
    lines += ["Not measured:", "", *(f"- {one}" for one in failed), ""] if failed else []
    card, made = result["card"], result["versions"]
    where = "{name} ({gib} GiB, driver {driver}, CUDA {cuda})".format(**card) if card["name"] else "CPU"
    small = ", small U-Nets" if result["quick"] else ""
    made_with = f"torch {made['torch']}, diffusers {made['diffusers']}, {result['dtype']}, random weights{small}"
    return "\n".join([*lines, f"{where}, {made_with}. `{result['command']}`"])


WHOSE = ("model", "mode", "sites", "batch", "method", "pictures", "path", "checkpointing", "command", "limits")


def _whose(row: Row) -> str:
    named = ("batch", "pictures", "checkpointing")
    return ", ".join(f"{k} {row[k]}" if k in named else str(row[k]) for k in WHOSE if k in row and k != "limits")


def _costs(result: Row) -> list[str]:
    sites = {(r["model"], r["batch"], r["method"]): r for r in result.get("sites", []) if "method" in r}
    gpu = {(r["model"], r["batch"], r["method"]): r for r in result.get("kernels", []) if "kernels" in r}
    cells = list(dict.fromkeys(key[:2] for key in (*sites, *gpu)))
    first = list({model: (model, batch) for model, batch in reversed(cells)}.values())[::-1]
    if not cells:
        return []

    def beyond(rows: dict[Any, Row], cell: tuple[str, int], method: str, key: str) -> str:
        mine, plain = (rows.get((*cell, m), {}).get(key) for m in (method, PLAIN))
        if method == PLAIN or mine is None or plain is None:
            return number(mine)
        return f"{mine - plain:+g}"

    def times(cell: tuple[str, int], method: str) -> str:
        row, mine, plain = sites.get((*cell, method), {}), *(gpu.get((*cell, m), {}) for m in (method, PLAIN))
        if method == PLAIN:
            return f"{number(row.get('call_ms'), '.1f')}; {number(plain.get('gpu_ms'), '.2f')} ms"
        both = mine.get("gpu_ms") and plain.get("gpu_ms")
        return f"{wall(row)}; {number(mine['gpu_ms'] / plain['gpu_ms'] if both else None, '.3f')}"

    def counts(cell: tuple[str, int], method: str) -> list[str]:
        row = sites.get((*cell, method), {})
        places = row.get("modules", 0) + row.get("joins", 0)
        operations = beyond(sites, cell, method, "operations") + (f" at {places}" if places else "")
        return [operations, beyond(gpu, cell, method, "kernels"), beyond(sites, cell, method, "synchronisations")]

    head = ["wall clock; GPU time", *(f"{model}, batch {batch}" for model, batch in cells)]
    lines = table(head, [[method, *(times(cell, method) for cell in cells)] for method in METHODS])
    lines += [
        "Plain: of a U-Net call. Else: wall clock of a picture over that of the same round's plain ones, with "
        "95 % interval (rounds), and GPU time of a call over the plain call's, the sum of what runs there.",
        "",
    ]
    head = ["beyond plain", *(f"{model}: {what}" for model, _ in first for what in ("operations", "kernels", "waits"))]
    lines += table(head, [[m, *(text for cell in first for text in counts(cell, m))] for m in METHODS])
    lines += [
        "Tensor operations of a U-Net call, and at how many places weights act; what the GPU runs in a call "
        f"(kernels, copies, fills; at batch {first[0][1]}); how often the host waits for it in a picture.",
        "",
    ]
    return lines


def _compiled(rows: list[Row]) -> list[str]:
    lines = []
    for row in (row for row in rows if "graphs" in row):
        other, waits = row["other"], [number(row[key]) for key in ("synchronisations", "plain_synchronisations")]
        off, plain, swapped, apart = (number(one, lacking="not finite") for one in
                                      (row["off"], row["plain_off"], other["off"], other["apart"]))  # fmt: skip
        lines.append([
            f"{row['mode']}, {row['model']}, {row['sites']}",
            f"{row['graphs']}; {row['recompiles']}; {other['graphs']}",
            f"{row['call_ms']:.2f} ms; {wall(row)}",
            f"{off} ({plain})",
            f"{swapped} ({apart})",
            f"{waits[0]} ({waits[1]})",
            number(row["cuda_graphs_skipped"]),
            f"{row['compile_s']} ({row['plain_compile_s']})",
        ])  # fmt: skip
    head = ["compiled: mode, model, sites", "graphs; more in 50 steps; for another schedule", "plain call; wall clock",
            "off (plain)", "another schedule: off (apart)", "waits (plain)", "CUDA graphs skipped",
            "seconds to compile (plain)"]  # fmt: skip
    below = ("Weighed against plain, both compiled, batch 2. Off: largest difference from what is not compiled, over "
             "the output's range; apart: of the two schedules.")  # fmt: skip
    return [*table(head, lines), below, ""] if lines else []


def _gradients(rows: list[Row]) -> list[str]:
    about = ("model", "pictures", "checkpointing")
    found = {(*(r[key] for key in about), r["path"]): r for r in rows if "seconds" in r}
    estimates = {tuple(r[key] for key in about): r["estimate_gib"] for r in rows if "estimate_gib" in r}

    def cell(row: Row) -> str:
        memory = "" if row.get("gib") is None else f"{row['gib']:.1f} GiB; "
        return f"{memory}{number(row.get('seconds'), '.1f')} s" + ("" if row.get("finite", True) else ", not finite")

    lines = []
    for key in dict.fromkeys(key[:3] for key in found):
        full, detached = (found.get((*key, path), {}) for path in ("full", "detached"))
        estimate = f"{estimates[key]:.1f} GiB" if key in estimates else "-"
        lines.append([f"{key[0]}, {key[1]}", key[2], cell(full), cell(detached), estimate])
    steps = max((row["steps"] for row in found.values()), default=0)
    head = ["model, pictures", "`model.checkpointing`", "full", "detached", "full, estimated on a CPU"]
    below = (f"An update of a gradient search, {steps} steps with guidance: peak memory with all weights, and time. "
             "Auto: what a search does on this card.")  # fmt: skip
    return [*table(head, lines), below, ""] if lines else []


# --- the run


def find_card(small: bool, logs: Path) -> tuple[Row, str]:
    """The GPU, and how processes are to be started: forked ones need no time to import, if CUDA allows it."""
    card: Row = {}
    for fork in (way for way in ("fork", "spawn") if way in multiprocessing.get_all_start_methods()):
        place = Place(torch.device("cpu"), small, time.monotonic() + 60)
        card = measure(Unit("card"), place, fork, logs)[0]
        if "error" not in card:
            break
    return {"name": None, **card}, fork


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small U-Nets, on any device, to gpu-quick.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=280.0, help="for all of it (280)")
    parser.add_argument("--out", type=Path, help="result file; the docs stay as they are")
    parser.add_argument("--table", action="store_true", help="only make the docs' tables from the result file")
    args = parser.parse_args()
    path = args.out or ROOT / "results" / ("gpu-quick.json" if args.small else "gpu.json")
    if args.table:
        into(ROOT.parent / "docs" / "apply.md", "gpu", markdown(json.loads(path.read_text())))
        return 0
    begun = time.monotonic()
    logs = args.out.with_suffix(".logs") if args.out else LOGS
    card, fork = find_card(args.small, logs)
    if not card["name"] and not args.small:
        why = card.get("error", "torch sees none")
        print(f"gpu.py: no CUDA device here ({why}): use a machine with a GPU, or try it with --small", file=sys.stderr)
        return 2
    device = torch.device("cuda" if card["name"] else "cpu")
    result: Row = {
        "name": "gpu",
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "quick": args.small,
        "card": card,
        "versions": versions(),
        "dtype": str(Place(device, args.small, 0).dtype).removeprefix("torch."),
    }
    old = json.loads(path.read_text()) if path.exists() else {}
    kept = [part for part in PARTS if part in old and part not in args.only]
    if any(old.get(key) != result[key] for key in ("card", "versions", "quick")):
        kept = []
    result |= {part: old[part] for part in kept}
    result["notes"] = [note for note in old.get("notes", []) if note["part"] in kept]
    chosen = units(args.only, device.type == "cuda")
    total, passed = sum(unit.share for unit in chosen), 0.0
    for unit in chosen:
        passed += unit.share
        place = Place(device, args.small, begun + args.seconds * passed / total)
        rows = [{"error": f"no time left of {args.seconds:g} s: --only {unit.part}, or more --seconds"}]
        if place.left > LEAST:
            rows = measure(unit, place, fork, logs)
        result[unit.part] = result.get(unit.part, []) + [row for row in rows if row.keys() != {"error"}]
        notes = [row["error"] for row in rows if row.keys() == {"error"}]
        result["notes"] += [{"part": unit.part, "unit": unit.name, "reason": why} for why in notes]
        result["seconds"] = round(time.monotonic() - begun, 1)
        write_text(path, json.dumps(result, indent=1) + "\n")  # also if it is stopped half-way
    print()
    if args.out:
        print(markdown(result))
    else:
        publish(result, markdown(result), path, "apply.md")
    print(f"\n{path}: {result['seconds']} s" + ("" if card["name"] else ", no GPU: nothing here says what one does"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
