"""Cross entropy against a naive one-hot form in float64, by hand, and where floats are at their limits."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.errors import UserError
from t5x_like.layers.logits import LazyLogits
from t5x_like.models import losses
from t5x_like.models.contract import LossAndMetrics
from t5x_like.models.losses import TokenLoss, cross_entropy, loss_and_metrics
from t5x_like.planning import hlo
from t5x_like.sharding import Partitioner, ShardingRules, fsdp_rules, make_mesh
from t5x_like.typing import Array


def naive(
    logits: np.ndarray | Array, targets: np.ndarray, label_smoothing: float, z_loss: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T5X's definition with its one-hot targets: (loss, z-loss, gradient of the summed loss)."""
    logits = np.asarray(logits, np.float64)
    vocab = logits.shape[-1]
    low = label_smoothing / (vocab - 1)
    soft = np.where(np.eye(vocab, dtype=bool)[targets], 1 - label_smoothing, low)
    largest = logits.max(-1, keepdims=True)
    log_z = largest + np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    perfect = -sum(p * np.log(p) for p in [1 - label_smoothing] + [low] * (vocab - 1) if p > 0)
    z_losses = z_loss * log_z[..., 0] ** 2
    loss = -(soft * (logits - log_z)).sum(-1) - perfect + z_losses
    return loss, z_losses, (1 + 2 * z_loss * log_z) * np.exp(logits - log_z) - soft


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_agrees_with_one_hot_form(label_smoothing: float, z_loss: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 5, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (2, 5))
    loss, z_losses, gradient = naive(logits, targets, label_smoothing, z_loss)

    def total(x: Array) -> tuple[Array, TokenLoss]:
        result = cross_entropy(x, jnp.asarray(targets), label_smoothing, z_loss)
        return result.loss.sum(), result

    (_, result), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(logits))
    np.testing.assert_allclose(result.loss, loss, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(result.z_loss, z_losses, rtol=1e-6)
    np.testing.assert_allclose(grad, gradient, rtol=1e-5, atol=1e-6)


def test_by_hand() -> None:
    # softmax (1/4, 3/4), log Z = log 4: loss of the second entry log(4/3), z-loss (log 4)^2 / 10.
    result = cross_entropy(jnp.log(jnp.array([[1.0, 3.0]])), jnp.array([1]), z_loss=0.1)
    np.testing.assert_allclose(result.z_loss, [0.19218121], rtol=1e-6)
    np.testing.assert_allclose(result.loss, [0.28768207 + 0.19218121], rtol=1e-6)


def test_best_smoothed_prediction_costs_nothing() -> None:
    best = jnp.log(jnp.array([0.05, 0.05, 0.85, 0.05]))
    loss = cross_entropy(best, jnp.array(2), label_smoothing=0.15).loss
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)


def test_huge_logits() -> None:
    # 20000 where the target is lowest, log 2 where two are highest, 0 where it is highest alone.
    logits = jnp.array([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [-1e4, -1e4, 1e4]])
    targets = jnp.array([1, 0, 2])
    loss = cross_entropy(logits, targets, z_loss=1e-4)
    np.testing.assert_allclose(loss.z_loss, [1e4, 1e4 + 2 * 0.6931472, 1e4], rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(logits, targets).loss, [2e4, 0.6931472, 0.0], rtol=1e-7)
    grad = jax.grad(lambda x: cross_entropy(x, targets).loss.sum())(logits)
    np.testing.assert_array_equal(grad, [[1.0, -1.0, 0.0], [-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])


def test_bfloat16_logits_are_upcast() -> None:
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 3, (4, 300)), jnp.bfloat16)
    logits = logits.at[0, 0].set(18.0)  # p = 0.9995, which bfloat16 cannot tell from 1: its gradient must not be 0
    targets = jnp.array([0, 7, 42, 299])
    expected, expected_z, expected_grad = naive(logits.astype(jnp.float32), np.asarray(targets), 0.1, 1e-2)
    result = cross_entropy(logits, targets, 0.1, 1e-2)
    assert result.loss.dtype == result.z_loss.dtype == jnp.float32
    np.testing.assert_allclose(result.loss, expected, rtol=2e-6)
    np.testing.assert_allclose(result.z_loss, expected_z, rtol=1e-6)
    grad = jax.grad(lambda x: cross_entropy(x, targets, 0.1, 1e-2).loss.sum())(logits)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(grad, np.float32), expected_grad, rtol=2**-8, atol=1e-7)


def test_removed_entries_and_foreign_targets() -> None:
    logits = jnp.array([[0.0, -jnp.inf, 0.0], [0.0, 0.0, 0.0]])
    loss = cross_entropy(logits, jnp.array([2, 3])).loss
    np.testing.assert_allclose(loss[0], 0.6931472, rtol=1e-6)
    assert np.isnan(loss[1])  # 3 is not in a vocabulary of 3: it must not pass for a number
    grad = jax.grad(lambda x: cross_entropy(x, jnp.array([2, 2])).loss[0])(logits)
    np.testing.assert_allclose(grad[0], [0.5, 0.0, -0.5], rtol=1e-6)


def test_needs_one_buffer_of_the_logits_size() -> None:
    """The gradient itself; one-hot targets, or shifted logits kept for the gradient, would be another."""
    logits = jax.ShapeDtypeStruct((4, 32, 4096), jnp.float32)
    targets = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    step = jax.jit(jax.value_and_grad(lambda x, t: cross_entropy(x, t, z_loss=1e-4).loss.sum()))
    memory = step.lower(logits, targets).compile().memory_analysis()
    size = 4 * 32 * 4096 * 4
    assert memory.output_size_in_bytes < 1.1 * size
    assert memory.temp_size_in_bytes < 0.1 * size


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.0])
def test_refuses_impossible_smoothing(label_smoothing: float) -> None:
    with pytest.raises(UserError, match=f"label_smoothing is {label_smoothing}"):
        cross_entropy(jnp.zeros((1, 2)), jnp.array([0]), label_smoothing)


def test_accuracy_is_that_of_argmax_among_equals_too() -> None:
    logits = np.random.default_rng(4).integers(0, 4, (6, 50, 7)).astype(np.float32)
    logits[0, 0] = np.nan
    targets = np.random.default_rng(5).integers(0, 7, (6, 50))
    sums = loss_and_metrics(jnp.asarray(logits), jnp.asarray(targets), jnp.ones((6, 50)))
    expected = (logits.argmax(-1) == targets)[np.isfinite(logits).all(-1)].sum()
    assert 20 < expected == float(sums.metrics["accuracy"].total)


# ---- The loss by parts, from logits that are not multiplied out ----


def lazy(rng: np.random.Generator, transposed: bool, bias: bool) -> tuple[LazyLogits, np.ndarray]:
    """Logits of 4 x 7 targets and 11 tokens, and the same multiplied out in float64."""
    hidden, table, offset = rng.normal(size=(4, 7, 5)), rng.normal(size=(11, 5)), bias * rng.normal(size=11)
    arrays = (jnp.asarray(x, jnp.float32) for x in (hidden, table.T if transposed else table))
    return LazyLogits(
        *arrays, jnp.asarray(offset, jnp.float32) if bias else None, transposed
    ), hidden @ table.T + offset


@pytest.mark.parametrize(("transposed", "bias"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("part_bytes", [1, 4 * 4 * 11 * 3, 2**26])  # one column a part; three; everything
def test_by_parts_agrees_with_the_whole(
    monkeypatch: pytest.MonkeyPatch, transposed: bool, bias: bool, part_bytes: int
) -> None:
    monkeypatch.setattr(losses, "PART_BYTES", part_bytes)
    rng = np.random.default_rng(1)
    logits, dense = lazy(rng, transposed, bias)
    targets, weights = rng.integers(0, 11, (4, 7)), rng.integers(0, 2, (4, 7))
    loss, z_losses, by_logits = naive(dense, targets, 0.1, 1e-2)
    by_logits *= 3 * weights[..., None]  # the loss is used three times

    def total(logits: LazyLogits) -> tuple[Array, LossAndMetrics]:
        sums = loss_and_metrics(logits, jnp.asarray(targets), jnp.asarray(weights), 0.1, 1e-2)
        return 3 * sums.loss.total, sums

    (_, sums), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for found in (sums, jax.jit(total)(logits)[1]):  # with the gradient, and without
        close(found.loss.total, (loss * weights).sum())
        close(found.metrics["z_loss"].total, (z_losses * weights).sum())
        assert float(found.metrics["accuracy"].total) == ((dense.argmax(-1) == targets) * weights).sum()
        assert {float(x.weight) for x in (found.loss, *found.metrics.values())} == {weights.sum()}
    table = np.asarray(logits.table, np.float64)
    close(gradient.hidden, by_logits @ (table.T if transposed else table))
    by_table = np.einsum("blv,ble->ve", by_logits, np.asarray(logits.hidden, np.float64))
    close(gradient.table, by_table.T if transposed else by_table)
    if bias:
        close(gradient.bias, by_logits.sum((0, 1)))


CONTEXT = ShardingRules(batch=("replica", "expert"), embed="data", length=("data", "model"))


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ({"data": 4, "model": 2}, fsdp_rules()),
        ({"data": 2, "expert": 2, "model": 2}, fsdp_rules()),
        ({"data": 8}, fsdp_rules()),
        ({"data": 2, "expert": 2, "model": 2}, CONTEXT),
        ({"data": 4, "model": 2}, CONTEXT),  # does not divide the length, but the batch
    ],
)
def test_by_parts_agrees_on_a_mesh(monkeypatch: pytest.MonkeyPatch, mesh: dict[str, int], rules: ShardingRules) -> None:
    """The batch of 8 is split over all but `model`, which splits the vocabulary of 12; with FSDP the table as well.

    Under context parallelism `data` splits the length of 6 instead. Every device multiplies its share, and no more.
    """
    rng = np.random.default_rng(2)
    logits = LazyLogits(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 6, 8), (12, 8), (12,))))
    targets, weights = jnp.asarray(rng.integers(0, 12, (8, 6))), jnp.ones((8, 6))

    def total(logits: LazyLogits) -> tuple[Array, LossAndMetrics]:
        sums = loss_and_metrics(logits, targets, weights, z_loss=1e-2)
        return sums.loss.total, sums

    function = jax.value_and_grad(total, has_aux=True)
    expected = function(logits)
    monkeypatch.setattr(losses, "PART_BYTES", 4 * 2 * 12)
    partitioner = Partitioner(make_mesh(**mesh), rules)
    names = (("batch", None, None), ("vocab", "embed"), ("vocab",))
    shardings = LazyLogits(*(partitioner.sharding(*axes) for axes in names))
    with partitioner.active():
        compiled = jax.jit(function, in_shardings=(shardings,)).lower(logits).compile()
        found = compiled(jax.device_put(logits, shardings))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)
    program = compiled.as_text()
    parsed = hlo.parse(program)
    work = sum(times * hlo.instruction_flops(parsed, place, each) for place, each, times in parsed.executed())
    assert work == pytest.approx(3 * 2 * (8 * 6 * 12 * 8) / 8)
    (loop,) = re.findall(r"\bwhile\(.*body=%([\w.]+)", program)
    body = re.search(rf"^%{re.escape(loop)} \(.*?^}}", program, re.MULTILINE | re.DOTALL)
    assert body is not None
    # The loop adds up a gradient of every shard's own; it is reduced once, behind the loop.
    moved = [line.split(" = ")[1] for line in body[0].splitlines() if re.search(r" all-(reduce|gather)\(", line)]
    assert not any(re.search(r"\[(1,)?(12|6),8\]", line.split(" all-")[0]) for line in moved), moved
    assert re.search(r"\[(1,)?(12|6),8\].* all-reduce\(", program.replace(body[0], ""))


def test_logits_are_never_there_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "PART_BYTES", 4 * 4 * 11)
    logits, _ = lazy(np.random.default_rng(3), False, False)
    targets, weights = jnp.zeros((4, 7), jnp.int32), jnp.ones((4, 7))
    function = jax.grad(lambda logits: loss_and_metrics(logits, targets, weights).loss.total)
    text = str(jax.make_jaxpr(function)(logits))
    assert "f32[1,4,11]" in text
    assert not re.search(r"f32\[(1,28|4,7|7,1,4),11\]", text)
