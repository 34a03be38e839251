"""A search that is killed at random moments ends as one that was not. `benchmarks/resume.py` does it more often."""

from __future__ import annotations

from pathlib import Path

from helpers.tiny import CONTROLS, SETTINGS, STUDIES, killed_search, save_tiny_pipeline

from rwopt.schedule import Schedule

# each kind once: no study, dials, a closed form, weights by gradient; all arms in `benchmarks/resume.py`
ARMS = ["plain", "best guidance", "analytic", "learned"]
TRIALS = {name: count for name, count in STUDIES.items() if name not in (*CONTROLS, "constant weights", "constant")}


def test_a_killed_search_goes_on_and_asks_for_no_more_trials(tmp_path: Path) -> None:
    model = save_tiny_pipeline(tmp_path / "model")
    folder = tmp_path / "run"
    settings = ["recipe=editing", *SETTINGS, f"model.name={model}", f"arms=[{','.join(ARMS)}]"]
    seen = killed_search(folder, settings, kills=2, seed=1, within=3.0)
    assert seen["trials"] == TRIALS
    Schedule.load(folder / "schedule.json")
    for name in ("report.html", "grid.png", "schedule.png", "history.png", "probe.png"):
        assert (folder / name).exists()
        assert str(folder / name) in str(seen["output"]) or name in ("schedule.png", "history.png", "probe.png")
    assert not list(folder.rglob(".*.tmp"))
    assert any(kill["killed"] for kill in seen["kills"])  # type: ignore[attr-defined]
