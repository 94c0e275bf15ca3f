"""Checks of what is written to disk: a run that goes on, another mesh, another library's format."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.checkpoints import huggingface
from t5x_like.checkpoints.huggingface.family import AnyModel
from t5x_like.checkpoints.manager import CheckpointPolicy, Checkpoints
from t5x_like.errors import UserError
from t5x_like.models.contract import Model
from t5x_like.sharding import Partitioner, make_mesh
from t5x_like.training.step import TrainStep
from t5x_like.training.train_state import TrainState
from t5x_like.typing import Array, Batch, Params
from t5x_like.verification.changes import with_values
from t5x_like.verification.compare import compare, same_bits
from t5x_like.verification.equivalences import EQUAL, Findings
from t5x_like.verification.layouts import looped
from t5x_like.verification.subject import NotApplicable, Run, Subject, devices

STEPS = 4


def resume(subject: Subject) -> Findings:
    """Steps without a stop against as many with a checkpoint halfway: losses and state, bit by bit."""
    run = _run(subject, Partitioner.single_device())
    half, _ = _train(subject, run, run.start(subject.params_of(subject.noisy)), STEPS // 2)
    with _saved(half) as saved:
        whole, rest = _train(subject, run, half, STEPS)
        restored, _ = saved.restore(STEPS // 2, run.abstract)
    resumed, again = _train(subject, run, restored, STEPS)
    yield (
        f"at step {STEPS // 2} of {STEPS}",
        same_bits({"losses": np.stack(again), **resumed._asdict()}, {"losses": np.stack(rest), **whole._asdict()}),
    )


def restore(subject: Subject) -> Findings:
    """A state saved from one mesh and read onto others, bit by bit."""
    count = len(devices())
    if count == 1:
        raise NotApplicable("there is one device")
    single = _run(subject, Partitioner.single_device())
    state, _ = _train(subject, single, single.start(subject.params_of(subject.noisy)), 1)
    expected = jax.device_get(state)._asdict()
    fsdp = dataclasses.replace(subject.rules, embed="data")
    from_mesh = Partitioner(make_mesh(data=count // 2, model=2, devices=devices()), fsdp)
    with _saved(_run(subject, from_mesh).place(state)) as saved:
        elsewhere = {
            "model=2": Partitioner(make_mesh(data=1, model=2, devices=devices()[:2]), subject.rules),
            "one device": Partitioner.single_device(),
        }
        for name, partitioner in elsewhere.items():
            restored, _ = saved.restore(1, _run(subject, partitioner).abstract)
            yield f"data={count // 2},model=2 FSDP to {name}", same_bits(restored._asdict(), expected)


def conversion(subject: Subject) -> Findings:
    """A Hugging Face folder written and read: parameters bit by bit, and the logits of the model that was read."""
    # Hugging Face's experts have a fixed capacity for every sequence; where all tokens have room, that is the same.
    model = with_values(subject.roomy, {"group_size": None})
    network = getattr(model, "network", None)
    families = [family for family in huggingface.FAMILIES if family.network is type(network)]
    if not families or not isinstance(model, AnyModel):
        raise NotApplicable(f"Hugging Face has no {type(network or model).__name__} that is known here")
    kinds = [kind for family in families for kind in family.classes]
    params, refused = subject.params_of(model), []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            try:
                huggingface.save(folder, model, params, kind)
            except UserError as error:
                refused.append(str(error))
                continue
            loaded = huggingface.load(folder, "float32")
        yield f"to {kind} and back", same_bits(looped(loaded.params), subject.params)
        batch = dict(subject.batch)
        logits = subject.call(_logits, loaded.model, loaded.params, batch), subject.call(_logits, model, params, batch)
        yield f"{kind}'s logits", compare({"logits": logits[0]}, {"logits": logits[1]}, EQUAL)
        return
    others = f" (nor {', '.join(kinds[1:])})" if kinds[1:] else ""
    raise NotApplicable(refused[0] + others)


def _run(subject: Subject, partitioner: Partitioner) -> Run:
    return subject.run(TrainStep(subject.noisy, subject.optimizer, subject.seed), partitioner)


def _train(subject: Subject, run: Run, state: TrainState, last: int) -> tuple[TrainState, list[np.ndarray]]:
    """Trains up to step `last`: the state, and every step's loss. Leaves the memory of `state` alone."""
    losses = []
    state = jax.tree.map(jnp.copy, state)
    for step in range(int(state.step), last):
        state, report = run(state, subject.draw(step))
        losses.append(np.asarray(report.scalars["loss"]))
    return state, losses


@contextlib.contextmanager
def _saved(state: TrainState) -> Iterator[Checkpoints]:
    """A folder with one checkpoint, gone afterwards."""
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder), CheckpointPolicy()) as checkpoints:
        checkpoints.save(int(state.step), state, {})
        checkpoints.steps()  # waits for it
        yield checkpoints


def _logits(model: Model, params: Params, batch: Batch) -> Array:
    return model.logits(params, batch)
