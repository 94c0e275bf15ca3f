"""What `scripts/benchmark.py` measures: a case is a function `(dtype, steps, **its options)` to a dict of figures."""
