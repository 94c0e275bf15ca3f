"""What `--dry_run` prints: everything about a run that can be known without running it."""

import math

import jax
from rich.console import Console
from rich.table import Table

from t5x_like.architectures.variables import named_axes, named_leaves
from t5x_like.data.loader import DatasetConfig
from t5x_like.models.contract import Model
from t5x_like.recipe import example_batch
from t5x_like.sharding import Partitioner
from t5x_like.training import train_state
from t5x_like.training.trainer import Trainer
from t5x_like.typing import PyTree


def print_plan(config: str, model: Model, dataset: DatasetConfig, trainer: Trainer, partitioner: Partitioner) -> None:
    """Prints the operative config, the parameters, tokens per step and estimated memory. Allocates nothing.

    Raises:
      UserError: the mesh does not divide the parameters or the batch.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(config)
    batch = example_batch(model, dataset, dataset.batch_size)
    shardings = train_state.state_shardings(model, trainer.optimizer, batch, partitioner)
    state = train_state.abstract(model, trainer.optimizer, batch, shardings)
    batch_sharding = partitioner.sharding("batch")

    table = Table("parameter", "shape", "logical axes", "split over", box=None)
    axes = dict(named_axes(model.logical_axes(batch)))
    for name, leaf in named_leaves(state.params):
        names = ", ".join(axis or "-" for axis in axes[name])
        split = ", ".join(str(part) for part in leaf.sharding.spec if part) or "-"
        table.add_row(name, " x ".join(map(str, leaf.shape)), names, split)
    Console(width=200, highlight=False).print(table)

    rows = dataset.batch_size
    tokens = sum(x.size for name, x in batch.items() if name.endswith("_tokens") and name != "decoder_input_tokens")
    console.print(f"\nparameters          {train_state.count_parameters(state.params):,}")
    console.print(f"mesh                {dict(partitioner.mesh.shape)}")
    console.print(f"tokens per step     {tokens:,} at most ({rows} rows of {dict(dataset.task_feature_lengths)})")
    for name, size in _memory(
        model, state, batch, trainer.microbatches, rows // batch_sharding.shard_shape((rows,))[0]
    ):
        console.print(f"{name:<19} {size / 2**30:.3f} GiB per device")


def _memory(
    model: Model, state: train_state.TrainState, batch: PyTree, microbatches: int, ways: int
) -> list[tuple[str, int]]:
    """Estimated bytes on the fullest device, by purpose, without the compiler's temporaries.

    What is kept for the backward pass counts as if only the batch were split.
    """
    part = {
        name: jax.ShapeDtypeStruct((x.shape[0] // microbatches, *x.shape[1:]), x.dtype) for name, x in batch.items()
    }

    def residuals(params: PyTree, part: PyTree) -> PyTree:
        return jax.vjp(lambda params: model.loss(params, part, jax.random.key(0)).loss.total, params)[1]

    kept = _bytes(jax.eval_shape(residuals, state.params, part)) - _bytes(state.params)
    params, opt_state = _shard_bytes(state.params), _shard_bytes(state.opt_state)
    sizes = {
        "parameters": params,
        "gradients": params,
        "optimizer state": opt_state,
        "activations (est.)": max(kept, 0) // ways,
    }
    return [*sizes.items(), ("total (est.)", sum(sizes.values()))]


def _bytes(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shard_bytes(tree: PyTree) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
