"""The maths of one layer: pure functions, and Linen modules that only own their weights."""
