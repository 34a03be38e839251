"""Learned editing schedules against every baseline (see comparison.py): `python benchmarks/editing.py [--quick]`."""

from comparison import main

if __name__ == "__main__":
    main("editing")
