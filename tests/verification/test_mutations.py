"""Every check against what it is there to find: a bug is planted, and has to be caught and named."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from shipped_models import model_of
from tiny import LENGTHS, tiny_model

from t5x_like.architectures import stack, transformer
from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.layers import masks, routing
from t5x_like.layers.attention import MultiHeadAttention
from t5x_like.layers.linear import Linear
from t5x_like.models import network
from t5x_like.models.contract import LossAndMetrics
from t5x_like.sharding import ways
from t5x_like.training.optimizers import adamw
from t5x_like.training.train_state import TrainState
from t5x_like.typing import Array
from t5x_like.verification import equivalences, experts, sequences, states
from t5x_like.verification.compare import Comparison
from t5x_like.verification.sheet import CHECKS, chosen, outcomes
from t5x_like.verification.shrink import shrink
from t5x_like.verification.subject import Subject

Plant = pytest.MonkeyPatch


def t5() -> Subject:
    """One layer on either side; programs are never shared between subjects, so that what is planted takes effect."""
    model = tiny_model("NUM_ENCODER_LAYERS=1", "NUM_DECODER_LAYERS=1")
    return Subject(model, LENGTHS, adamw(1e-3), packed=True)


def switch() -> Subject:
    small = shrink(model_of("switch_tiny", "GROUP_SIZE=1024"), {"inputs": 128, "targets": 40})
    return Subject(small.model, small.lengths, optax.sgd(1e-3))


def first(findings: equivalences.Findings) -> Comparison:
    return next(findings)[1]


def of(findings: equivalences.Findings) -> dict[str, Comparison]:
    return dict(findings)


def caught(comparison: Comparison, name: str) -> bool:
    return not comparison.passed and comparison.margin < 0 and (comparison.first_difference or "").startswith(name)


def test_a_missing_segment_mask(monkeypatch: Plant) -> None:
    """The decoder's queries see whatever is before them in the row, of any example."""
    sound = t5()
    assert first(sequences.leak(sound)) == Comparison(0.0, 0.0, None)
    assert first(sequences.packing(sound)).passed
    monkeypatch.setattr(
        transformer,
        "within",
        lambda n, segments=None, causal=False: masks.within(n, None if causal else segments, causal),
    )
    # Rows 2 and 3 are the first with two examples.
    assert caught(first(sequences.leak(t5())), "log-probability in row 2 of example 2[")
    assert caught(first(sequences.packing(t5())), "log-probability in row 2 of example 2[")


def test_an_encoder_that_sees_its_neighbours(monkeypatch: Plant) -> None:
    monkeypatch.setattr(transformer.Transformer, "_segments", lambda self, tokens, ids: (tokens != 0).astype(jnp.int32))
    assert caught(first(sequences.leak(t5())), "log-probability in row 2 of example 2[")


def test_a_loss_of_one_shard_alone(monkeypatch: Plant) -> None:
    """The sum over devices is forgotten: what the first one has is taken for all."""
    original = network.loss_and_metrics

    def of_first_shard(logits: object, targets: Array, weights: Array, *rest: float) -> LossAndMetrics:
        mine = jnp.arange(len(targets)) < len(targets) // ways("batch")
        return original(logits, targets, jnp.where(mine[:, None], weights, 0), *rest)

    monkeypatch.setattr(network, "loss_and_metrics", of_first_shard)
    assert caught(first(equivalences.meshes(t5())), "loss: ")


def test_a_gradient_that_is_not_summed_over_shards(monkeypatch: Plant) -> None:
    """The loss is right, and so is every gradient behind the last layer's residual stream."""
    original = transformer.constrain

    @jax.custom_vjp
    def partial(x: Array) -> Array:
        return x

    partial.defvjp(lambda x: (x, None), lambda _, gradient: (gradient / ways("batch"),))
    monkeypatch.setattr(transformer, "constrain", lambda x, *axes: original(partial(x), *axes))
    comparison = first(equivalences.meshes(t5()))
    assert caught(comparison, "decoder/layers_0/encoder_decoder_attention/key/kernel[")


def test_a_lost_dropout_key(monkeypatch: Plant) -> None:
    """Scanned layers get none; those in a loop do, and so does what is outside of the stacks."""
    original = stack.nn.scan
    monkeypatch.setattr(
        stack.nn, "scan", lambda *args, **options: original(*args, **(options | {"split_rngs": {"params": True}}))
    )
    found = of(equivalences.dropout(t5()))
    failed = [name for name, comparison in found.items() if not comparison.passed]
    assert failed == ["with scan=True"]
    assert {"in MultiHeadAttention", "in Encoder", "with scan=False", "with microbatches=2"} <= found.keys()


def test_a_dropout_key_that_the_step_does_not_pass_on(monkeypatch: Plant) -> None:
    original = network.NetworkModel.outputs
    monkeypatch.setattr(
        network.NetworkModel, "outputs", lambda self, params, batch, key=None: original(self, params, batch)
    )
    failed = {name for name, comparison in of(equivalences.dropout(t5())).items() if not comparison.passed}
    assert {"in MlpBlock", "with scan=True", "with microbatches=2", "with another key"} <= failed
    assert "with the same key" not in failed


class TransposedLinear(Linear):
    """Reads its kernel as if rows were columns."""

    def _parameters(self, inputs: tuple[int, ...]) -> tuple[Array, Array | None]:
        kernel, bias = super()._parameters(inputs)
        return kernel.T.reshape(kernel.shape), bias


def test_a_transposed_router_kernel(monkeypatch: Plant) -> None:
    subject = switch()
    assert first(experts.sparse(subject)).passed
    seen = experts.record(subject, subject.quiet)
    assert seen.keys() == {"encoder/layers_1/mlp", "decoder/layers_1/mlp"}
    assert all(experts.reference(each).dropped > 5 for each in seen.values())  # so that dropping is checked too
    monkeypatch.setattr(routing, "Linear", TransposedLinear)
    assert caught(first(experts.sparse(switch())), "decoder/layers_1/mlp[")


def test_gates_of_another_expert(monkeypatch: Plant) -> None:
    original = routing.top_k
    monkeypatch.setattr(
        routing, "top_k", lambda p, k: (jnp.roll(p, 1, axis=-1).max(axis=-1)[:, None] * 0.5, original(p, k)[1])
    )
    assert caught(first(experts.sparse(switch())), "decoder/layers_1/mlp[")


def test_a_wrong_cache_position(monkeypatch: Plant) -> None:
    assert first(sequences.decoding(t5())).passed
    original = MultiHeadAttention._append
    monkeypatch.setattr(
        MultiHeadAttention, "_append", lambda self, name, x, position: original(self, name, x, position + 1)
    )
    assert caught(first(sequences.decoding(t5())), "log-probability[")


def swapping(restore: Callable[..., tuple]) -> Callable[..., tuple]:
    def swapped(self: Checkpoints, step: int, like: TrainState) -> tuple:
        state, position = restore(self, step, like)
        attention = state.params["encoder"]["layers_0"]["attention"]
        attention["query"], attention["key"] = attention["key"], attention["query"]
        return state, position

    return swapped


def test_a_checkpoint_that_swaps_two_arrays(monkeypatch: Plant) -> None:
    subject = t5()
    assert all(comparison.passed for comparison in of(states.restore(subject)).values())
    monkeypatch.setattr(Checkpoints, "restore", swapping(Checkpoints.restore))
    assert caught(first(states.restore(subject)), "params/encoder/layers_0/attention/key/kernel[")
    assert caught(first(states.resume(subject)), "losses[0]")


def test_microbatches_whose_losses_are_means(monkeypatch: Plant) -> None:
    """A model that gives the mean of its batch where a sum is asked for."""
    subject = dataclasses.replace(t5(), packed=False)
    original = network.NetworkModel.loss

    def mean(self: network.NetworkModel, *arguments: object) -> LossAndMetrics:
        sums = original(self, *arguments)
        rows = len(arguments[1]["decoder_target_tokens"])
        return sums._replace(loss=sums.loss._replace(total=sums.loss.total * rows))

    monkeypatch.setattr(network.NetworkModel, "loss", mean)
    assert caught(first(equivalences.microbatches(subject)), "loss: ")


def test_a_check_that_breaks_down_has_failed(monkeypatch: Plant) -> None:
    def broken(self: Subject, *arguments: object) -> np.ndarray:
        raise TypeError("no such thing")

    monkeypatch.setattr(Subject, "log_probs", broken)
    [outcome] = outcomes(t5(), *chosen(["packing"]))
    assert outcome.comparison is not None
    assert outcome.comparison.first_difference == "TypeError: no such thing"


def test_what_does_not_apply_says_why() -> None:
    small = functools.partial(shrink, lengths={"inputs": 24, "targets": 8})(model_of("bert_tiny"))
    bert = Subject(small.model, small.lengths, optax.sgd(1e-3))
    reasons = {
        check.name: [o.reason for o in outcomes(bert, check)] for check in chosen(["packing", "decoding", "sparse"])
    }
    assert reasons == {
        "packing": ["a row holds one example"],
        "decoding": ["nothing is decoded token by token"],
        "sparse": ["no sparse layers"],
    }


def test_names_of_checks_are_unique() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
