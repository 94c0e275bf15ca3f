"""Attention one query at a time, in float64, with its gradient written out by hand."""

from collections.abc import Callable, Iterator

import numpy as np

Sees = Callable[[int, int, int], bool]
"""Whether, in a row of the batch, a query sees a key."""


def naive_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, sees: Sees, bias: np.ndarray | None = None
) -> np.ndarray:
    """`[b, l, h, d]` from `[b, l, h, d]`; bias is `[h, q, k]`; queries that see nothing stay zero."""
    out = np.zeros(query.shape)
    for b, q, h, seen, weights in _each_query(query, key, sees, bias):
        out[b, q, h] = weights @ value[b, seen, h]
    return out


def naive_gradients(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, cotangent: np.ndarray, sees: Sees
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the sum of output times `cotangent`, in query, key and value."""
    of_query, of_key, of_value = (np.zeros(array.shape) for array in (query, key, value))
    for b, q, h, seen, weights in _each_query(query, key, sees, None):
        of_weights = value[b, seen, h] @ cotangent[b, q, h]
        of_logits = weights * (of_weights - weights @ of_weights)
        of_query[b, q, h] = of_logits @ key[b, seen, h]
        for k, logit, weight in zip(seen, of_logits, weights, strict=True):
            of_key[b, k, h] += logit * query[b, q, h]
            of_value[b, k, h] += weight * cotangent[b, q, h]
    return of_query, of_key, of_value


def _each_query(
    query: np.ndarray, key: np.ndarray, sees: Sees, bias: np.ndarray | None
) -> Iterator[tuple[int, int, int, list[int], np.ndarray]]:
    """Row, query and head, the keys seen, and how much of each."""
    for b, q in np.ndindex(query.shape[:2]):
        seen = [k for k in range(key.shape[1]) if sees(b, q, k)]
        for h in range(query.shape[2] if seen else 0):
            logits = key[b, seen, h].astype(np.float64) @ query[b, q, h]
            if bias is not None:
                logits += bias[h, q, seen]
            exp = np.exp(logits - logits.max())
            yield b, q, h, seen, exp / exp.sum()
