"""The main job, from a recipe to a schedule and a report.

`search.py`: the stages of a run. What they use: `experiment.py` (model, cases, objective of a recipe; `splits.py`,
`evaluator.py`, `evaluation.py`), `space.py` (the box of a tuner and what its points mean), `arms.py` (what is
compared), `tuning.py` (how an arm is found), `probing.py`, `starts.py` and `baselines.py` (from probe scores to
starts and published schedules), `publish.py` and `verdict.py` (what is left behind). Beside a run: `worker.py`,
`comparison.py`, `identity.py`.
"""
