"""Greedy, sampling and beam search over one contract (`decoding.contract`)."""
