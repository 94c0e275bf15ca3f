"""What a way to run a job would take, by arithmetic alone: good enough to say which ways are worth compiling."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh

from t5x_like.architectures.stack import REMAT_POLICIES
from t5x_like.architectures.variables import named_axes, named_leaves
from t5x_like.planning.choice import Choice
from t5x_like.planning.hardware import Target
from t5x_like.recipe import Experiment, Recipe, example_batch
from t5x_like.sharding import MESH_AXES, LogicalAxes, ShardingRules, building_for, fsdp_rules, make_mesh
from t5x_like.training.flops import matmul_flops
from t5x_like.typing import Batch, PyTree

GIB = 2**30
FLOAT, HALF = 4, 2  # bytes


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one device.

    Attributes:
      memory_gib: parameters, optimiser state, gradients, and what is kept for the backward pass.
      seconds: of a step, if computing and communicating never wait for each other.
      work: seconds of computing, moving memory and communicating, added up: tells ways apart that are equally fast if
        nothing ever waits.
    """

    memory_gib: float
    seconds: float
    work: float


@dataclasses.dataclass(frozen=True)
class Workload:
    """A job, whatever way it is run.

    Attributes:
      arrays: shape and logical axes of every parameter.
      batch: examples.
      tokens: of encoder and decoder, in a batch.
      flops: of a step without recomputation, on all devices.
      recomputed: more, by remat policy.
      kept: bytes kept for the backward pass, by remat policy, on all devices.
      opt_per_parameter: bytes of optimiser state for each byte of parameters.
    """

    arrays: Mapping[str, tuple[tuple[int, ...], LogicalAxes]]
    batch: int
    tokens: Mapping[str, int]
    flops: float
    recomputed: Mapping[str, float]
    kept: Mapping[str, float]
    opt_per_parameter: float

    @classmethod
    def of(cls, recipe: Recipe, target: Target) -> "Workload":
        """Traced, one policy after another, for the smallest batch that the model takes."""
        with building_for(target.devices):
            policies = {
                name: recipe.build(f"REMAT={None if name == 'none' else name}") for name in ("none", *REMAT_POLICIES)
            }
            experiment = policies["none"]
            rows = experiment.dataset.batch_size
            batch = example_batch(experiment.model, experiment.dataset, 1)
            params = jax.eval_shape(lambda: experiment.model.init(jax.random.key(0), batch))
            axes = dict(named_axes(experiment.model.logical_axes(batch)))
            opt_state = jax.eval_shape(experiment.trainer.optimizer.init, params)
            flops = {name: float(rows * _flops(each, params, batch)) for name, each in policies.items()}
            kept = {name: float(rows) * kept_bytes(each, params, batch) for name, each in policies.items()}
        names = {name for name in batch if name.endswith("_tokens") and name != "decoder_target_tokens"}
        return cls(
            {name: (leaf.shape, axes[name]) for name, leaf in named_leaves(params)},
            rows,
            {name.partition("_")[0]: rows * batch[name].shape[-1] for name in names},
            flops["none"],
            {name: more - flops["none"] for name, more in flops.items()},
            kept,
            _bytes(opt_state) / _bytes(params),
        )

    @functools.cached_property
    def experts(self) -> int:
        """Of its sparse layers; 1 without any."""
        found = (shape[axes.index("experts")] for shape, axes in self.arrays.values() if "experts" in axes)
        return max(found, default=1)

    def estimate(self, choice: Choice, target: Target) -> Estimate | None:
        """What `choice` would take; None where the mesh does not divide something."""
        assert choice.mesh is not None
        mesh = AbstractMesh(choice.mesh, MESH_AXES)
        rules = fsdp_rules() if choice.fsdp else ShardingRules()
        share = {name: _share(shape, axes, rules, mesh) for name, (shape, axes) in self.arrays.items()}
        parts, rows = choice.microbatches or 1, math.prod(choice.mesh[:3])
        if None in share.values() or self.batch % (rows * parts):
            return None
        model, remat = choice.mesh[3], choice.remat or "none"
        params = sum(FLOAT * math.prod(self.arrays[name][0]) * (part or 0) for name, part in share.items())
        state = params * (1 + self.opt_per_parameter)
        gradients = params * (2 if parts > 1 else 1)
        kept = 0.0 if choice.keeps_on_host else self.kept[remat] / (rows * parts * model)
        memory = state + gradients + kept
        compute = (self.flops + self.recomputed[remat]) / len(target.devices) / target.chip.peak_flops
        # What products read, FSDP or not: three times in each part of the batch.
        whole = [(math.prod(shape), _share(shape, axes, ShardingRules(), mesh)) for shape, axes in self.arrays.values()]
        moved = 3 * parts * HALF * sum(size * (part or 0) for size, part in whole) + 2 * state + 2 * kept * parts
        waiting = moved / target.chip.memory_bandwidth
        parts_of_step = compute, waiting, *self._talking(choice, target, share).values()
        return Estimate(memory / GIB, max(parts_of_step), sum(parts_of_step))

    def _talking(self, choice: Choice, target: Target, share: Mapping[str, float | None]) -> dict[str, float]:
        """Seconds on the links, and between slices."""
        assert choice.mesh is not None
        parts, remat = choice.microbatches or 1, choice.remat or "none"
        again = 1 if remat in ("full", "save_qkv") else 0  # a block's inputs are gathered once more
        sizes = dict(zip(MESH_AXES, choice.mesh, strict=True))
        rows = sizes["replica"] * sizes["data"] * sizes["expert"]
        seconds = {"ICI": 0.0, "DCN": 0.0}

        def send(axis: str, size: float) -> None:
            if sizes[axis] > 1:
                bandwidth, network = _along(axis, choice.mesh or (), target)
                seconds[network] += size * (sizes[axis] - 1) / sizes[axis] / bandwidth

        for name, (shape, axes) in self.arrays.items():
            local = math.prod(shape) * (share[name] or 0)
            send("replica", 2 * parts * FLOAT * local)
            over = [axis for axis in ("data", "expert") if not (axis == "expert" and "experts" in axes)]
            for axis in over:
                if choice.fsdp and "embed" in axes:  # gathered forward and backward, and the gradient scattered
                    whole = local * math.prod(sizes[each] for each in over)
                    send(axis, parts * ((2 + again) * HALF + FLOAT) * whole / len(over))
                else:
                    send(axis, 2 * parts * FLOAT * local)
            if name.endswith(("/wo/kernel", "/out/kernel")):  # it ends a block: scattered, and gathered for the next
                layers = shape[axes.index("layers")] if "layers" in axes else 1
                side = "encoder" if name.startswith("encoder") else "decoder"
                stream = layers * HALF * self.tokens.get(side, max(self.tokens.values())) / rows * shape[-1]
                send("model", (4 + 2 * again) * stream)
                if "experts" in axes:
                    send("expert", (4 + 2 * again) * 1.25 * stream)  # with room for a quarter more, as is usual
        return seconds


@functools.lru_cache(maxsize=4096)
def _along(axis: str, mesh: tuple[int, ...], target: Target) -> tuple[float, str]:
    """Bandwidth along a mesh axis, and over which network."""
    sizes = dict(zip(MESH_AXES, mesh, strict=True))
    devices = make_mesh(**sizes, devices=target.devices).devices
    group = list(devices[tuple(slice(None) if name == axis else 0 for name in MESH_AXES)])
    return target.bandwidth(group), "DCN" if target.crosses_slices(group) else "ICI"


def _share(shape: tuple[int, ...], axes: LogicalAxes, rules: ShardingRules, mesh: AbstractMesh) -> float | None:
    """Which part of an array one device holds; None where the mesh does not divide it."""
    ways = 1
    for size, part in zip(shape, rules.spec(axes, mesh), strict=True):
        names = (part,) if isinstance(part, str) else part or ()
        count = math.prod(mesh.shape[name] for name in names)
        if size % count:
            return None
        ways *= count
    return 1 / ways


def _flops(experiment: Experiment, params: PyTree, batch: Batch) -> int:
    return matmul_flops(jax.grad(lambda p: experiment.model.loss(p, batch, jax.random.key(0)).loss.total), params)


def kept_bytes(experiment: Experiment, params: PyTree, batch: Batch) -> int:
    """Bytes that one example leaves for the backward pass, beside parameters."""

    def residuals(params: PyTree) -> PyTree:
        return jax.vjp(lambda p: experiment.model.loss(p, batch, jax.random.key(0)).loss.total, params)[1]

    return max(_bytes(jax.eval_shape(residuals, params)) - _bytes(params), 0)


def kept_gib(experiment: Experiment) -> float:
    """GiB that one example leaves for the backward pass on all devices together."""
    batch = example_batch(experiment.model, experiment.dataset, 1)
    params = jax.eval_shape(lambda: experiment.model.init(jax.random.key(0), batch))
    return kept_bytes(experiment, params, batch) / GIB


def _bytes(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
