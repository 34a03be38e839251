"""Learned generation schedules against every baseline: `python benchmarks/generation.py [--quick]`."""

from comparison import main

if __name__ == "__main__":
    main("generation")
