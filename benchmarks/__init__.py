"""Benchmarks, each run as `python -m benchmarks.NAME` from the repository root. What they measured is in results/."""
