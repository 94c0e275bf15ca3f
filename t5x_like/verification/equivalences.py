"""Checks of what a training step computes: the same loss and gradients, however they are computed.

Every check is a generator over a `Subject`: of names of what it tried, and comparisons.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.interpreters.partial_eval import dce_jaxpr

from t5x_like.architectures.stack import REMAT_POLICIES, LayerStack
from t5x_like.layers.attention import DotProduct
from t5x_like.layers.chunked_attention import Chunked
from t5x_like.models.contract import LossAndMetrics, Model
from t5x_like.models.distillation import DistilledModel
from t5x_like.sharding import Partitioner, ShardingRules, make_mesh
from t5x_like.training.step import TrainStep
from t5x_like.training.train_state import TrainState
from t5x_like.typing import Array, Batch, Params, PRNGKey
from t5x_like.verification.changes import Field, changed, fields_of, with_values
from t5x_like.verification.compare import Comparison, compare, said, same_bits
from t5x_like.verification.subject import DROPOUT, Named, NotApplicable, Subject, devices, in_stacks

Findings: TypeAlias = Iterator[tuple[str, Comparison]]
"""What a check says, one by one: what it tried, and how that went."""

EQUAL = 1e-5
"""Two ways of computing the same in float32 differ by less, relative to the largest entry of a tensor ..."""
FLOOR = 1e-2
"""... or to this share of the largest gradient of all: some gradients are zero but for rounding."""

BFLOAT16_LOSS = 0.02
"""How far bfloat16 may be from float32: the loss, relative to it."""
BFLOAT16_GRADIENT = 0.2
"""Likewise the gradient by all parameters as one vector, relative to its length."""


def equal(found: Named, expected: Named) -> Comparison:
    """Loss and gradients, equal but for rounding."""
    largest = max((float(np.abs(x).max(initial=0.0)) for name, x in expected.items() if name != "loss"), default=0.0)
    return compare(found, expected, EQUAL, FLOOR * largest)


def meshes(subject: Subject) -> Findings:
    """Loss and every gradient on meshes of up to eight devices, with dropout, against one device."""
    count = len(devices())
    if count == 1:
        raise NotApplicable("there is one device; XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight")
    experts = [f.value for f in fields_of(subject.model) if f.name == "num_experts" and isinstance(f.value, int)]
    split = math.gcd(count, 4, *experts)
    rules, replica = subject.rules, 2 if count == 8 else 1
    several = {"replica": replica, "data": count // 2 // replica, "model": 2}
    tried: list[tuple[dict[str, int], ShardingRules, str]] = [
        ({"data": count}, rules, ""),
        ({"data": 1, "model": 2}, rules, ""),
        (several, dataclasses.replace(rules, embed="data"), " FSDP"),
        ({"data": min(count, 4)}, dataclasses.replace(rules, batch=("replica", "expert"), length="data"), " context"),
    ]
    if experts:
        tried.append(({"data": count // split, "expert": split}, rules, ""))
    for sizes, rules, kind in tried:
        mesh = make_mesh(**sizes, devices=devices()[: math.prod(sizes.values())])
        name = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) + kind
        yield name, equal(subject.gradients(subject.noisy, Partitioner(mesh, rules)), subject.gradients_noisy)


def scan(subject: Subject) -> Findings:
    """Layers under one scan against layers in a loop, from the same parameters, twice the pattern."""
    deep = dataclasses.replace(subject, model=in_stacks(subject.model, "repeats", 2))
    deep = subject if deep == subject else deep
    loop, scanned = (in_stacks(deep.quiet, "scan", scan) for scan in (False, True))
    if loop == scanned:
        raise NotApplicable("no LayerStack, so that nothing can be scanned")
    yield "", equal(deep.gradients(scanned), deep.gradients(loop))


def remat(subject: Subject) -> Findings:
    """Every policy of rematerialisation against the config's, with dropout: keys are the same in the second pass."""
    configured = {f.value for f in fields_of(subject.model) if f.name == "remat" and isinstance(f.owner, LayerStack)}
    if not configured:
        raise NotApplicable("no LayerStack, so that nothing can be recomputed")
    for policy in (None, *REMAT_POLICIES):
        if configured != {policy}:
            model = in_stacks(subject.noisy, "remat", policy)
            yield policy or "none", equal(subject.gradients(model), subject.gradients_noisy)


def microbatches(subject: Subject) -> Findings:
    """A batch in two parts, one after the other, against the whole of it."""
    parts = [np.arange(first, len(next(iter(subject.batch.values()))), 2) for first in range(2)]
    # Rows are put in order, since experts choose among tokens of neighbouring ones.
    whole = {name: np.asarray(x)[np.concatenate(parts)] for name, x in subject.batch.items()}
    found = subject.gradients(subject.quiet, microbatches=2)
    yield "", equal(found, subject.gradients(subject.quiet, batch=whole))


def attention(subject: Subject) -> Findings:
    """Attention in blocks, shorter than the sequence too, and with all weights in memory, against the config's form."""
    forms = {f.value for f in fields_of(subject.model) if isinstance(f.value, Chunked | DotProduct)}
    if not forms:
        raise NotApplicable("no layer has attention that could also go block by block")
    tried: dict[str, Chunked | DotProduct] = {
        "plain": DotProduct(),
        "blocks": Chunked(),
        "blocks of 7x5": Chunked(7, 5),
    }
    for name, form in tried.items():
        if forms != {form}:
            yield name, equal(subject.gradients(_attending_by(subject.quiet, form)), subject.gradients_quiet)


def _attending_by(model: Model, form: Chunked | DotProduct) -> Model:
    return changed(model, lambda f: form if isinstance(f.value, Chunked | DotProduct) else f.value)


def dropout(subject: Subject) -> Findings:
    """A key acts: in every kind of layer that drops, however layers are run; the same key gives the same bits."""
    trained = subject.model.student if isinstance(subject.model, DistilledModel) else subject.model
    kinds = list(dict.fromkeys(type(field.owner) for field in _rates(trained)))
    if not kinds:
        raise NotApplicable("nothing has a dropout_rate")
    lost = "the loss does not depend on the key"
    for kind in kinds:
        yield f"in {kind.__name__}", said(_key_acts(subject, _only(subject, [kind])), lost)
    stacks = [field.value for field in fields_of(trained) if isinstance(field.value, LayerStack)]
    layers = [type(field.owner) for stack in stacks for field in _rates(stack.pattern)]
    for name, value in (("scan", False), ("scan", True), ("remat", "full")) if layers else ():
        acts = _key_acts(subject, in_stacks(_only(subject, layers), name, value))
        yield f"with {name}={value}", said(acts, lost)
    yield "with microbatches=2", said(_step_acts(subject, _only(subject, kinds)), lost)

    def losses(key: PRNGKey | None) -> Named:
        return {"loss": subject.call(_loss, subject.noisy, params, dict(subject.batch), key).loss.total}

    params, keys = subject.params_of(subject.noisy), [jax.random.key(seed) for seed in range(2)]
    first, again, other = losses(keys[0]), losses(keys[0]), losses(keys[1])
    yield "with another key", said(first != other, f"loss {first['loss']} with both")
    yield "with the same key", same_bits(again, first)


def _rates(tree: object) -> list[Field]:
    return [field for field in fields_of(tree) if field.name == "dropout_rate"]


def _only(subject: Subject, kinds: Sequence[type]) -> Model:
    """The model with nothing drawn in training but the dropout of these kinds of layers."""
    return changed(subject.quiet, lambda f: DROPOUT if f.name == "dropout_rate" and type(f.owner) in kinds else f.value)


def _key_acts(subject: Subject, model: Model) -> bool:
    """Whether the loss is made of the key too; nothing is computed to find out."""
    params, batch = jax.tree.map(jnp.asarray, (subject.params_of(model), dict(subject.batch)))
    return _depends(lambda key: model.loss(params, batch, key).loss.total, jax.random.key(0))


def _step_acts(subject: Subject, model: Model) -> bool:
    """The same of a training step in two parts, whose key is made of the step's number, and nothing else is."""
    step = TrainStep(model, optax.identity(), subject.seed, microbatches=2)
    params, batch = jax.tree.map(jnp.asarray, (subject.params_of(model), dict(subject.batch)))

    def loss(number: Array) -> Array:
        return step(TrainState(number, params, optax.EmptyState()), batch)[1].scalars["loss"]

    return _depends(loss, jnp.zeros((), jnp.int32))


def _depends(function: Callable[[Array], Array], argument: Array) -> bool:
    return bool(dce_jaxpr(jax.make_jaxpr(function)(argument).jaxpr, [True])[1][0])


def bfloat16(subject: Subject) -> Findings:
    """Products of bfloat16 against those of float32: the loss, and the length of what the gradients differ by."""
    expected = subject.gradients_quiet
    found = subject.gradients(with_values(subject.quiet, {"dtype": "bfloat16"}))
    yield "loss", compare({"loss": found["loss"]}, {"loss": expected["loss"]}, BFLOAT16_LOSS)
    names = [name for name in expected if name != "loss"]
    # As vectors, since single entries may be zero, and a token near the border between two experts may change sides.
    gap = _length([found[name] - expected[name] for name in names])
    length = _length([expected[name] for name in names])
    yield "gradient", compare({"gradient": length + gap}, {"gradient": length}, BFLOAT16_GRADIENT)


def _length(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Of all of them as one vector."""
    return np.sqrt(sum((np.square(x, dtype=np.float64).sum() for x in vectors), start=np.float64(0.0)))


def _loss(model: Model, params: Params, batch: Batch, key: PRNGKey | None) -> LossAndMetrics:
    return model.loss(params, batch, key)
