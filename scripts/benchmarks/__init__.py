"""Benchmark cases of scripts/benchmark.py, by what they measure."""
