"""The seqio tasks on the shipped corpora, and where any task is found by its name: `registry`."""
