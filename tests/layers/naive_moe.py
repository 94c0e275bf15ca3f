"""The sparse layer as the papers write it: token by token in Python and float64, the oracle of `test_moe`.

Fedus et al. 2021 (eq. 1-4), Lepikhin et al. 2021 (top-2), Riquelme et al. 2021 (batch priority), Roller et al. 2021
(hashing), Zhou et al. 2022 (expert choice), Zoph et al. 2022 (z-loss, second-expert policy).
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "linear": lambda x: x,
}

Place = tuple[int, int, float]
"""A token of the group, an expert that took it, and the gate."""


@dataclasses.dataclass(frozen=True)
class Naive:
    """What a layer is to do. `kind`: top_k, expert_choice or hash; `capacity` None: unlimited; `rows` make a group."""

    num_experts: int
    kind: str = "top_k"
    choices: int = 1
    normalize: bool = False
    second_threshold: float | None = None
    prioritize: bool = False
    capacity: int | None = None
    activations: tuple[str, ...] = ("relu",)
    balance_loss: float = 0.0
    z_loss: float = 0.0
    rows: int = 1


@dataclasses.dataclass
class Result:
    """The output, and sums over real tokens under the names of `RouterReport`."""

    y: np.ndarray
    load: np.ndarray
    tokens: float = 0.0
    loss: float = 0.0
    balance_loss: float = 0.0
    z_loss: float = 0.0
    entropy: float = 0.0
    confidence: float = 0.0
    dropped: float = 0.0


def softmax(logits: np.ndarray) -> list[float]:
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def top_k_places(layer: Naive, p: list[list[float]], real: list[bool], draws: np.ndarray | None) -> list[Place]:
    """Serves everyone's first choice, then everyone's second, ..., each as long as the expert has room."""
    queue = [s for s in range(len(p)) if real[s]]
    if layer.prioritize:  # by the largest of a token's probabilities: Riquelme et al. 2021, section 4
        queue.sort(key=lambda s: -max(p[s]))
    places: list[Place] = []
    taken = [0] * layer.num_experts
    for k in range(layer.choices):
        for s in queue:
            favourites = sorted(range(layer.num_experts), key=lambda e, s=s: -p[s][e])[: layer.choices]
            gate = p[s][favourites[k]]
            if layer.normalize:
                gate /= sum(p[s][e] for e in favourites)
            given_up = k > 0 and draws is not None and draws[k][s] >= min(1.0, gate / layer.second_threshold)
            if given_up or (layer.capacity is not None and taken[favourites[k]] == layer.capacity):
                continue
            taken[favourites[k]] += 1
            places.append((s, favourites[k], gate))
    return places


def expert_choice_places(layer: Naive, p: list[list[float]], real: list[bool]) -> list[Place]:
    places = []
    for e in range(layer.num_experts):
        ranking = sorted((s for s in range(len(p)) if real[s]), key=lambda s, e=e: -p[s][e])
        places += [(s, e, p[s][e]) for s in ranking[: layer.capacity]]
    return places


def hashed(token_id: int, num_experts: int, seed: int = 0) -> int:
    """Knuth's multiplicative hash and MurmurHash3's finaliser, in 32 bits."""
    bits = (token_id * 2654435761 + seed) % 2**32
    bits ^= bits >> 16
    bits = bits * 2246822507 % 2**32
    bits ^= bits >> 13
    bits = bits * 3266489909 % 2**32
    bits ^= bits >> 16
    return bits % num_experts


def hash_places(layer: Naive, ids: np.ndarray, real: list[bool]) -> list[Place]:
    places: list[Place] = []
    taken = [0] * layer.num_experts
    for s, token_id in enumerate(ids):
        e = hashed(int(token_id), layer.num_experts)
        if real[s] and (layer.capacity is None or taken[e] < layer.capacity):
            taken[e] += 1
            places.append((s, e, 1.0))
    return places


def add_statistics(result: Result, layer: Naive, logits: list[np.ndarray], p: list[list[float]]) -> None:
    """Adds those of one group, given its real tokens; means over the group, times how many they are."""
    number = len(p)
    if number == 0:
        return
    f = [sum(row.index(max(row)) == e for row in p) / number for e in range(layer.num_experts)]
    mean = [sum(row[e] for row in p) / number for e in range(layer.num_experts)]
    balance = layer.num_experts * sum(a * b for a, b in zip(f, mean, strict=True))  # Fedus et al. eq. 4
    z = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits) / number  # Zoph et al. eq. 5
    result.balance_loss += number * balance
    result.z_loss += number * z
    result.loss += number * (layer.balance_loss * balance + layer.z_loss * z)
    result.entropy += sum(-sum(q * math.log(q) for q in row) for row in p)
    result.confidence += sum(max(row) for row in p)


def expert_output(layer: Naive, expert: dict, e: int, x: np.ndarray) -> np.ndarray:
    hidden = 1.0
    for i, activation in enumerate(layer.activations):
        name = "wi" if len(layer.activations) == 1 else f"wi_{i}"
        hidden = hidden * ACTIVATIONS[activation](x @ expert[name]["kernel"][e])
    return hidden @ expert["wo"]["kernel"][e]


def sparse_mlp(
    layer: Naive, params: dict, x: np.ndarray, real: np.ndarray, ids: np.ndarray, draws: np.ndarray | None = None
) -> Result:
    """`x` [batch, length, M]; `draws` [groups, choices, S]: the second-expert policy's uniform numbers, if on."""
    width = x.shape[-1]
    x, real, ids = (a.reshape(-1, layer.rows * real.shape[1], *a.shape[2:]) for a in (x, real, ids))
    result = Result(np.zeros(x.shape), np.zeros(layer.num_experts), float(real.sum()))
    for g in range(len(x)):
        if layer.kind == "hash":
            places = hash_places(layer, ids[g], list(real[g]))
            result.confidence += float(real[g].sum())
        else:
            logits = [token @ params["router"]["router_weights"]["kernel"] for token in x[g]]
            p = [softmax(row) for row in logits]
            add_statistics(result, layer, *([row[s] for s in np.flatnonzero(real[g])] for row in (logits, p)))
            if layer.kind == "expert_choice":
                places = expert_choice_places(layer, p, list(real[g]))
            else:
                places = top_k_places(layer, p, list(real[g]), None if draws is None else draws[g])
        for s, e, gate in places:
            result.y[g, s] += gate * expert_output(layer, params["expert"], e, x[g, s])
            result.load[e] += 1
        result.dropped += sum(real[g]) - len({s for s, _, _ in places})
    result.y = result.y.reshape(-1, real.shape[1] // layer.rows, width)
    return result
