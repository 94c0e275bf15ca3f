"""Optimisers: each is an `optax.GradientTransformation` made by a function, so any of optax's serves as well.

In gin, Adafactor with clipped gradients and a frozen embedding:

    Trainer.optimizer = @optimizers.partition()
    optimizers.partition.rules = (("token_embedder/.*", @optimizers.freeze()),)
    optimizers.partition.default = @optimizers.chain()
    optimizers.chain.transformations = (@optax.clip_by_global_norm(), @optimizers.adafactor())
    optax.clip_by_global_norm.max_norm = 1.0
    optimizers.adafactor.learning_rate = @schedules.rsqrt()
"""

import difflib
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_like.architectures.variables import named_leaves, parameter_name
from t5x_like.errors import UserError
from t5x_like.training import schedules
from t5x_like.typing import Array, Float, Int, Params, PyTree, Scalar

STACKS: Mapping[str, int] = MappingProxyType({"layers": 1, "expert": 0})
"""Which axis is a stack: below `layers` axis 1 counts layers (T5X's scalable_t5), below `expert` axis 0 experts."""


# ---- Optimisers ----


def adafactor(  # long because the arguments are T5X's, and published recipes name each of them
    learning_rate: schedules.Schedule | float | None = None,
    multiply_by_parameter_scale: bool = True,
    beta1: float | None = None,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    weight_decay_rate: float | None = None,
    min_dim_size_to_factor: int = 128,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    stacked_axes: Mapping[str, int] = STACKS,
) -> optax.GradientTransformation:
    """Adafactor with T5's rules (Shazeer and Stern 2018, algorithms 4 to 6; names and defaults are T5X's).

    A leaf is a matrix, or a stack of them. Its first axes are a matrix's rows and the rest its columns,
    split where rows + columns is least: `[embed, heads, head_dim]` is embed x (heads * head_dim), as T5X
    stores it. Every statistic (moments, clipping, parameter scale) belongs to one matrix of the stack, so
    scanned layers train just as unscanned ones do. The step t counts from 1.

    Args:
        learning_rate: None is the relative step min(1e-2, 1 / sqrt(t)).
        multiply_by_parameter_scale: scale each update by max(epsilon2, RMS(parameter)).
        beta1: momentum, kept of the finished updates and without bias correction; None keeps none.
        decay_rate: c in the second moment's decay 1 - t^-c; the first step takes the gradient's square alone.
        clipping_threshold: d, largest RMS of an update before the learning rate; None does not clip.
        weight_decay_rate: share of the parameter taken off per step, whatever the learning rate (as in T5X).
        min_dim_size_to_factor: keep the whole second moment of matrices with fewer rows or columns.
        epsilon1: added to the squared gradient.
        epsilon2: least parameter scale, which lets zeros grow.
        stacked_axes: from a part of a leaf's name to the axis that is then a stack; several may hold at once.

    Returns:
        A transformation that works in float32 and returns updates in the parameters' own dtype.

    Raises:
        UserError: (from `init`) a leaf has no axis where `stacked_axes` says its stack is.
    """
    over_matrices = functools.partial(_map_matrices, stacked_axes)
    stages = [_scale_by_factored_rms(over_matrices, decay_rate, epsilon1, min_dim_size_to_factor)]
    if clipping_threshold is not None:
        stages.append(_clip_by_rms(over_matrices, clipping_threshold))
    if multiply_by_parameter_scale:
        stages.append(_scale_by_parameter_rms(over_matrices, epsilon2))
    stages.append(_descend(schedules.relative_step() if learning_rate is None else learning_rate))
    if beta1 is not None:
        stages.append(optax.ema(beta1, debias=False))
    if weight_decay_rate is not None:
        stages.append(optax.add_decayed_weights(-weight_decay_rate))  # minus: these are finished updates
    return _in_float32(optax.chain(*stages))


def adamw(
    learning_rate: schedules.Schedule | float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
) -> optax.GradientTransformation:
    """`optax.adamw` (Loshchilov and Hutter 2019) in float32, with a rate that `learning_rate_of` finds.

    The weight decay is multiplied by the learning rate. To spare some parameters, use `partition`.
    """
    adam, decay = optax.scale_by_adam(b1, b2, eps), optax.add_decayed_weights(weight_decay)
    return _in_float32(optax.chain(adam, decay, _descend(learning_rate)))


def freeze() -> optax.GradientTransformation:
    """Leaves parameters as they are, bit for bit, and keeps no state."""
    # Not optax.set_to_zero: -0.0 + 0.0 is 0.0, while adding -0.0 changes nothing.
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates))


# ---- Combinations ----


def chain(transformations: Sequence[optax.GradientTransformation]) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` of one argument, which gin can bind: each works on what the one before made."""
    return optax.chain(*transformations)


def partition(
    rules: Sequence[tuple[str, optax.GradientTransformation]],
    default: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Gives each parameter the transformation of the first rule that matches its name.

    Args:
        rules: (pattern, transformation) pairs; the pattern is a regular expression for the whole name.
        default: the transformation of parameters which no rule matches.

    Returns:
        A transformation which keeps for each rule the state of its own parameters alone.

    Raises:
        UserError: a pattern is malformed, or (from `init`) is the first match of no parameter.
    """
    try:
        patterns = {f"rule_{i}": re.compile(pattern) for i, (pattern, _) in enumerate(rules)}
    except re.error as error:
        raise UserError(f"partition.rules: {error.pattern!r} is not a regular expression: {error}") from error
    transformations = {f"rule_{i}": transformation for i, (_, transformation) in enumerate(rules)}

    def labels(params: Params) -> PyTree[str]:
        names = [name for name, _ in named_leaves(params)]
        chosen = [next((r for r, p in patterns.items() if p.fullmatch(name)), "default") for name in names]
        for rule, pattern in patterns.items():
            if names and rule not in chosen:  # optax.tree_map_params asks with an empty tree
                raise _matches_nothing(pattern.pattern, names)
        return jax.tree.unflatten(jax.tree.structure(params), chosen)

    return optax.partition({"default": default, **transformations}, labels)


def _matches_nothing(pattern: str, names: Sequence[str]) -> UserError:
    nearest = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0))
    return UserError(
        f"partition.rules: {pattern!r} is the first match of no parameter. It must match a whole name"
        f" (re.fullmatch) that no earlier rule takes; nearest names: {nearest}"
    )


class ParameterEmaState(NamedTuple):
    """The inner transformation's state, and the average of the parameters, float32 and shaped as they are."""

    inner: optax.OptState
    ema: Params


def with_parameter_ema(inner: optax.GradientTransformation, decay: float) -> optax.GradientTransformationExtraArgs:
    """Keeps in the state ema = decay * ema + (1 - decay) * updated parameters, from the first on.

    Raises:
        UserError: `decay` lies outside [0, 1).
    """
    if not 0.0 <= decay < 1.0:
        raise UserError(f"with_parameter_ema.decay is {decay}; the share kept at each step must lie in [0, 1)")
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> ParameterEmaState:
        # A copy even of float32: a buffer that is both parameter and average could not be donated.
        ema = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
        return ParameterEmaState(inner.init(params), ema)

    def update(
        updates: Params, state: ParameterEmaState, params: Params | None = None, **extra_args: object
    ) -> tuple[Params, ParameterEmaState]:
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        new_params = optax.tree.cast(optax.apply_updates(params, updates), jnp.float32)
        ema = optax.incremental_update(new_params, state.ema, 1.0 - decay)
        return updates, ParameterEmaState(inner_state, ema)

    return optax.GradientTransformationExtraArgs(init, update)


# ---- What a trainer reads from any optimiser's state ----


def learning_rate_of(opt_state: optax.OptState) -> Scalar | None:
    """Learning rate of the last update: the state's first leaf named `learning_rate`, or None.

    `adafactor`, `adamw` and `optax.inject_hyperparams` keep one; in a `partition`, the default's comes first.
    """
    rates = (leaf for name, leaf in named_leaves(opt_state) if name.split("/")[-1] == "learning_rate")
    return next((jnp.asarray(rate, jnp.float32) for rate in rates), None)


def ema_params(opt_state: optax.OptState) -> Params | None:
    """The parameter average (float32) if `with_parameter_ema` keeps one anywhere in the state, else None."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, ParameterEmaState))
    return next((node.ema for node in nodes if isinstance(node, ParameterEmaState)), None)


# ---- Stages of Adafactor ----


class _Matrix(NamedTuple):
    """The axes of a leaf that are its matrices' rows and columns; along the others, matrices are stacked."""

    rows: tuple[int, ...]
    cols: tuple[int, ...]

    def rms(self, x: Float[Array, "*shape"]) -> Float[Array, "*ones"]:
        return jnp.sqrt(jnp.mean(jnp.square(x), axis=self.rows + self.cols, keepdims=True))


def _matrix(name: str, shape: tuple[int, ...], stacked_axes: Mapping[str, int]) -> _Matrix:
    stack = {stacked_axes[part] for part in name.split("/") if part in stacked_axes}
    if not stack <= set(range(len(shape))):
        raise UserError(
            f"adafactor.stacked_axes is {dict(stacked_axes)}, but parameter {name} has shape {list(shape)}:"
            " change stacked_axes or the parameter's name"
        )
    own = tuple(axis for axis in range(len(shape)) if axis not in stack)
    splits = [_Matrix(own[:i], own[i:]) for i in range(len(own) + 1)]
    return min(splits, key=lambda split: sum(_size(shape, axes) for axes in split))


def _size(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    return math.prod(shape[axis] for axis in axes)


def _map_matrices(
    stacked_axes: Mapping[str, int], function: Callable[..., PyTree], tree: Params, *others: PyTree
) -> PyTree:
    """Maps function(matrix, leaf, *others' leaves) over the leaves of a tree."""

    def on_leaf(path: tuple[jax.tree_util.KeyEntry, ...], leaf: Array, *rest: PyTree) -> PyTree:
        return function(_matrix(parameter_name(path), leaf.shape, stacked_axes), leaf, *rest)

    return jax.tree.map_with_path(on_leaf, tree, *others)


class _Moments(NamedTuple):
    """Averages of one leaf's squared gradient; what it does not need is `[1]`, as in optax."""

    v_row: Float[Array, "..."]
    v_col: Float[Array, "..."]
    v: Float[Array, "..."]


class FactoredState(NamedTuple):
    """Adafactor's second moments: `v_row` lacks a leaf's column axes, `v_col` its row axes, `v` none."""

    step: Int[Array, ""]
    v_row: Params
    v_col: Params
    v: Params


def _factored_state(step: Int[Array, ""], moments: PyTree[_Moments]) -> FactoredState:
    def field(i: int) -> Params:
        return jax.tree.map(lambda m: m[i], moments, is_leaf=lambda node: isinstance(node, _Moments))

    return FactoredState(step, *(field(i) for i in range(3)))


def _scale_by_factored_rms(
    over_matrices: Callable[..., PyTree], decay_rate: float, epsilon: float, min_dim_size: int
) -> optax.GradientTransformation:
    """Divides gradients by the root of their second moment, of which only row and column means are kept."""

    def is_factored(matrix: _Matrix, shape: tuple[int, ...]) -> bool:
        return min(_size(shape, axes) for axes in matrix) >= min_dim_size

    def init(params: Params) -> FactoredState:
        def zeros(matrix: _Matrix, param: Array) -> _Moments:
            def mean_over(axes: tuple[int, ...]) -> Array:
                return jnp.zeros([size for axis, size in enumerate(param.shape) if axis not in axes])

            if is_factored(matrix, param.shape):
                return _Moments(mean_over(matrix.cols), mean_over(matrix.rows), jnp.zeros(1))
            return _Moments(jnp.zeros(1), jnp.zeros(1), mean_over(()))

        return _factored_state(jnp.zeros((), jnp.int32), over_matrices(zeros, params))

    def update(grads: Params, state: FactoredState, params: Params | None = None) -> tuple[Params, FactoredState]:
        step = optax.safe_increment(state.step)
        decay = 1.0 - step.astype(jnp.float32) ** -decay_rate

        def moments(matrix: _Matrix, grad: Array, v_row: Array, v_col: Array, v: Array) -> _Moments:
            def averaged(old: Array, axes: tuple[int, ...]) -> Array:
                return decay * old + (1.0 - decay) * jnp.mean(jnp.square(grad) + epsilon, axis=axes)

            if is_factored(matrix, grad.shape):
                return _Moments(averaged(v_row, matrix.cols), averaged(v_col, matrix.rows), v)
            return _Moments(v_row, v_col, averaged(v, ()))

        def scaled(matrix: _Matrix, grad: Array, new: _Moments) -> Array:
            if not is_factored(matrix, grad.shape):
                return grad * jax.lax.rsqrt(new.v)
            row, col = jnp.expand_dims(new.v_row, matrix.cols), jnp.expand_dims(new.v_col, matrix.rows)
            row /= jnp.mean(row, axis=matrix.rows, keepdims=True)
            return grad * jax.lax.rsqrt(row) * jax.lax.rsqrt(col)

        new_moments = over_matrices(moments, grads, state.v_row, state.v_col, state.v)
        return over_matrices(scaled, grads, new_moments), _factored_state(step, new_moments)

    return optax.GradientTransformation(init, update)


def _clip_by_rms(over_matrices: Callable[..., PyTree], threshold: float) -> optax.GradientTransformation:
    def clipped(matrix: _Matrix, update: Array) -> Array:
        return update / jnp.maximum(1.0, matrix.rms(update) / threshold)

    return optax.stateless(lambda updates, params: over_matrices(clipped, updates))


def _scale_by_parameter_rms(over_matrices: Callable[..., PyTree], epsilon: float) -> optax.GradientTransformation:
    def scaled(matrix: _Matrix, update: Array, param: Array) -> Array:
        return update * jnp.maximum(matrix.rms(param), epsilon)

    return optax.stateless(lambda updates, params: over_matrices(scaled, updates, params))


# ---- Parts that optimisers share ----


class LearningRateState(NamedTuple):
    """Steps taken, and the learning rate of the last (before the first: of the first)."""

    step: Int[Array, ""]
    learning_rate: Scalar


def _descend(learning_rate: schedules.Schedule | float) -> optax.GradientTransformation:
    """Multiplies by minus the learning rate, and keeps it where `learning_rate_of` finds it."""
    schedule = learning_rate if callable(learning_rate) else schedules.constant(learning_rate)

    def init(params: Params) -> LearningRateState:
        step = jnp.zeros((), jnp.int32)
        return LearningRateState(step, jnp.asarray(schedule(step), jnp.float32))

    def update(
        updates: Params, state: LearningRateState, params: Params | None = None
    ) -> tuple[Params, LearningRateState]:
        rate = jnp.asarray(schedule(state.step), jnp.float32)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return updates, LearningRateState(optax.safe_increment(state.step), rate)

    return optax.GradientTransformation(init, update)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` in float32; updates come back in the parameters' dtype, as `optax.apply_updates` needs."""

    def init(params: Params) -> optax.OptState:
        return inner.init(optax.tree.cast(params, jnp.float32))

    def update(updates: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        if params is None:
            raise ValueError("this optimiser needs the parameters too: call update(gradients, state, params)")
        updates, params32 = optax.tree.cast((updates, params), jnp.float32)
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes float32 and int32
            updates, state = inner.update(updates, state, params32)
        return jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params), state

    return optax.GradientTransformation(init, update)
