"""A check of sparse layers: what they do to a batch against a reference that goes token by token, in float64.

The reference knows nothing of slots, sorting or gathering: it reads the papers' equations from the layer's fields.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from t5x_like.layers.moe import Experts, SparseMlp
from t5x_like.layers.routing import ExpertChoice, HashRouter, Router, Tokens, TopK
from t5x_like.models.contract import Model
from t5x_like.training.step import step_key
from t5x_like.typing import Array, Batch, Float, Params, PRNGKey, PyTree
from t5x_like.verification.changes import changed, fields_of
from t5x_like.verification.compare import compare
from t5x_like.verification.equivalences import EQUAL, Findings
from t5x_like.verification.subject import NotApplicable, Subject, in_stacks

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0))),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "linear": lambda x: x,
}


class Place(NamedTuple):
    """A token of a group, an expert that took it, and the gate."""

    token: int
    expert: int
    gate: float


class Recorded(NamedTuple):
    """A sparse layer, whether it was called as in training, and what for."""

    layer: SparseMlp
    training: bool
    seen: "Seen"


class Seen(NamedTuple):
    """What a sparse layer was given, and what it made of it."""

    params: Params
    x: PyTree
    tokens: Tokens
    y: PyTree


def sparse(subject: Subject) -> Findings:
    """Every sparse layer, dropping tokens as in training, against the same experts applied to one token at a time."""
    layers = [field.value for field in fields_of(subject.model) if isinstance(field.value, SparseMlp)]
    if not layers:
        raise NotApplicable("no sparse layers")
    for layer in layers:
        for part, known in ((layer.expert, Experts), (layer.router, Router | HashRouter)):
            if not isinstance(part, known):
                raise NotApplicable(f"no reference for {type(part).__name__}")
        if not isinstance(layer.router.choose, TopK | ExpertChoice):
            raise NotApplicable(f"no reference for {type(layer.router.choose).__name__}")
    recorded = record(subject, subject.quiet)
    expected = {name: reference(each).y for name, each in recorded.items()}
    yield "", compare({name: each.seen.y for name, each in recorded.items()}, expected, EQUAL)


def record(subject: Subject, model: Model) -> dict[str, Recorded]:
    """What every sparse layer does in a training step, by its name in a loop."""
    layers: dict[str, tuple[SparseMlp, bool]] = {}
    seen: dict[str, Seen] = {}

    def watched(layer: SparseMlp) -> SparseMlp:
        class Watched(SparseMlp):
            def __call__(self, x: Float[Array, "batch length M"], tokens: Tokens) -> Float[Array, "batch length M"]:
                y = super().__call__(x, tokens)
                name = "/".join(self.path)
                layers[name] = layer, self.has_rng("dropout")  # a teacher is called as in evaluation
                seen[name] = Seen(self.variables["params"], x, tokens, y)
                return y

        return Watched(layer.expert, layer.router, layer.capacity, layer.group_size)

    loop = in_stacks(in_stacks(model, "scan", False), "remat", None)  # what is recorded must not be within a loop
    loop = changed(loop, lambda f: watched(f.value) if isinstance(f.value, SparseMlp) else f.value)

    def run(model: Model, params: Params, batch: Batch, key: PRNGKey) -> dict[str, Seen]:
        model.loss(params, batch, key)
        return dict(seen)

    arrays = subject.call(run, loop, subject.params_of(loop), dict(subject.batch), step_key(subject.seed, 0))
    return {name: Recorded(*layers[name], Seen(*each)) for name, each in arrays.items()}


class Mapped(NamedTuple):
    """A layer's output, and the real tokens that no expert took."""

    y: np.ndarray
    dropped: int


def reference(recorded: Recorded) -> Mapped:
    """What a layer's output is to be, from what it was given.

    Fedus et al. 2021 (equations 1 to 3), Lepikhin et al. 2021 (several choices), Riquelme et al. 2021 (priority),
    Zhou et al. 2022 (experts that choose), Roller et al. 2021 (hashing).
    """
    layer, training, seen = recorded
    assert isinstance(layer.expert, Experts)  # as `sparse` has made sure
    batch, length, width = seen.x.shape
    rows = _rows_per_group(layer.group_size, batch, length)
    x, real, ids = (
        np.asarray(each).reshape(-1, rows * length, *each.shape[2:])
        for each in (seen.x, seen.tokens.real, seen.tokens.ids)
    )
    count, size = layer.expert.num_experts, rows * length
    capacity = size if layer.capacity is None else layer.capacity(size, count, layer.router.choose.choices, training)
    y, dropped = np.zeros(x.shape), 0
    for g in range(len(x)):
        if isinstance(layer.router, HashRouter):
            places = _hashed(layer.router.seed, ids[g], real[g], count, capacity)
        else:
            logits = x[g].astype(np.float64) @ np.asarray(seen.params["router"]["router_weights"]["kernel"], np.float64)
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            choose = layer.router.choose
            tokens = [s for s in range(size) if real[g, s]]
            if isinstance(choose, ExpertChoice):
                places = _chosen_by_experts(p, tokens, capacity)
            else:
                places = _chosen_by_tokens(choose, p, tokens, capacity)
        for token, expert, gate in places:
            y[g, token] += gate * _expert(layer.expert, seen.params["expert"], expert, x[g, token].astype(np.float64))
        dropped += int(real[g].sum()) - len({place.token for place in places})
    return Mapped(y.reshape(batch, length, width), dropped)


def _rows_per_group(group_size: int | None, batch: int, length: int) -> int:
    most = 1 if group_size is None else max(group_size // length, 1)
    return max(rows for rows in range(1, min(most, batch) + 1) if batch % rows == 0)


def _chosen_by_tokens(choose: TopK, p: np.ndarray, tokens: Sequence[int], capacity: int) -> list[Place]:
    """Everyone's first choice, then everyone's second, ..., each as long as its expert has room."""
    queue = sorted(tokens, key=lambda s: -p[s].max()) if choose.prioritize else tokens
    free = [capacity] * p.shape[1]
    places = []
    for k in range(choose.choices):
        for s in queue:
            favourites = np.argsort(-p[s], kind="stable")[: choose.choices]
            expert = int(favourites[k])
            if free[expert]:
                free[expert] -= 1
                gate = p[s, expert] / (p[s, favourites].sum() if choose.normalize else 1.0)
                places.append(Place(s, expert, float(gate)))
    return places


def _chosen_by_experts(p: np.ndarray, tokens: Sequence[int], capacity: int) -> list[Place]:
    """Every expert takes the tokens that like it best."""
    ranked = [sorted(tokens, key=list(-likes).__getitem__) for likes in p.T]
    return [Place(s, e, float(p[s, e])) for e, ranking in enumerate(ranked) for s in ranking[:capacity]]


def _hashed(seed: int, ids: np.ndarray, real: np.ndarray, experts: int, capacity: int) -> list[Place]:
    """The expert that MurmurHash3's finaliser gives to a token's id."""
    free = [capacity] * experts
    places = []
    for s in np.flatnonzero(real):
        bits = (int(ids[s]) * 0x9E3779B1 + seed) % 2**32
        bits = (bits ^ bits >> 16) * 0x85EBCA6B % 2**32
        bits = (bits ^ bits >> 13) * 0xC2B2AE35 % 2**32
        expert = (bits ^ bits >> 16) % experts
        if free[expert]:
            free[expert] -= 1
            places.append(Place(int(s), expert, 1.0))
    return places


def _expert(experts: Experts, params: Params, expert: int, x: np.ndarray) -> np.ndarray:
    names = ["wi"] if len(experts.activations) == 1 else [f"wi_{i}" for i in range(len(experts.activations))]
    hidden = np.ones(())
    for name, activation in zip(names, experts.activations, strict=True):
        hidden = hidden * ACTIVATIONS[activation](x @ np.asarray(params[name]["kernel"][expert], np.float64))
    return hidden @ np.asarray(params["wo"]["kernel"][expert], np.float64)
