"""The sparse feed-forward block: many experts, each token in a few. G S E C K as in `routing`, M embed, H mlp."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

from t5x_like.errors import UserError
from t5x_like.layers.dropout import Dropout
from t5x_like.layers.mlp import check_activations, gated, input_names
from t5x_like.layers.parameters import parameter
from t5x_like.layers.products import kept, product
from t5x_like.layers.routing import Capacity, CapacityFactor, ExpertSlots, Router, TokenChoices, Tokens, take_rows
from t5x_like.sharding import constrain, per_shard, ways
from t5x_like.typing import Array, Float, Int, Scalar

REPORTS = "router"
"""The variable collection in which sparse layers leave a `RouterReport` when it is mutable."""


class RouterReport(NamedTuple):
    """What one sparse layer did with one batch, summed over its real tokens so that shards and microbatches add up.

    Attributes:
      tokens: how many there were.
      loss: what training adds to its own loss, differentiable.
      balance_loss: see `routing.Routed`, as are the next three.
      z_loss: likewise.
      entropy: likewise.
      confidence: likewise.
      dropped: tokens that no expert took.
      load: tokens in every expert.
    """

    tokens: Scalar
    loss: Scalar
    balance_loss: Scalar
    z_loss: Scalar
    entropy: Scalar
    confidence: Scalar
    dropped: Scalar
    load: Float[Array, " E"]


class Experts(nn.Module):
    """Feed-forward blocks side by side: `MlpBlock`'s matrices with an axis of experts in front.

    Attributes:
      num_experts: E.
      mlp_dim: width in the middle of each.
      activations: as in `MlpBlock`: one ungated, several gated.
      dropout_rate: between the matrices ("expert dropout"; Fedus et al. 2021 fine-tune with 0.4).
      init_scale: kernels are truncated normals of variance init_scale / fan_in (0.1: Fedus et al. 2021, section 2.4).
      dtype: of the products.
    """

    num_experts: int
    mlp_dim: int
    activations: tuple[str, ...] = ("relu",)
    dropout_rate: float = 0.0
    init_scale: float = 0.1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_activations("Experts", self.activations)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "... M"], multiply: Callable[[Array, Array], Array], hidden_axes: tuple[str | None, ...]
    ) -> Float[Array, "... M"]:
        """Applies to every token the expert that it stands with.

        Args:
          x: tokens, in an order that `multiply` understands.
          multiply: tokens by the matrices of their experts, float32 [E, in, out], to the tokens' dtype.
          hidden_axes: logical axes of the hidden activations.
        """
        x = x.astype(self.dtype)
        names = input_names(self.activations)
        branches = [kept(name, multiply(x, self._kernel(name, x.shape[-1], self.mlp_dim))) for name in names]
        # One mask for the slots of an expert in a group, as `MlpBlock` has for a sequence; sorted tokens have none.
        dropout = Dropout(self.dropout_rate, broadcast_dims=(-2,) if x.ndim == 4 else ())
        hidden = dropout(gated(self.activations, branches))
        return kept("wo", multiply(constrain(hidden, *hidden_axes), self._kernel("wo", self.mlp_dim, x.shape[-1])))

    def _kernel(self, name: str, inputs: int, outputs: int) -> Array:
        axes = ("mlp", "embed") if name == "wo" else ("embed", "mlp")
        shape = (self.num_experts, inputs, outputs)
        return _Kernel(shape, ("experts", *axes), self.init_scale, name=name)()


@functools.cache  # equal initialisers are drawn from by one program
def _truncated_normal(scale: float) -> Initializer:
    return nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal", batch_axis=0)


class _Kernel(nn.Module):
    """One matrix per expert under T5X's name, `wi/kernel`."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init_scale: float

    @nn.compact
    def __call__(self) -> Array:
        return parameter(self, "kernel", _truncated_normal(self.init_scale), self.axes, self.shape)


class SparseMlp(nn.Module):
    """A router and its experts: takes the place of an `MlpBlock` (Fedus et al. 2021, figure 2).

    Tokens are routed within groups of whole sequences. A dropped token's output is zero: the residual carries it on.
    Over an `expert` mesh axis, two all-to-alls take tokens to their experts and back.

    Attributes:
      expert: the experts (T5X's parameter name).
      router: chooses experts.
      capacity: how many tokens an expert takes from a group; None takes all of them ("dropless"), by grouped products
        over sorted tokens. Those are made for TPU and GPU: on a CPU, XLA multiplies every token with every expert.
        Dropless layers gather the experts' weights where those are split.
      group_size: tokens of a group at most, but at least one sequence; None makes every sequence a group. Larger groups
        drop fewer tokens, and a mesh must divide their number.
    """

    expert: nn.Module
    router: nn.Module = Router()
    capacity: Capacity | None = CapacityFactor()
    group_size: int | None = None

    @property
    def causal(self) -> bool:
        """Whether a decoder may use it."""
        return self.router.choose.causal

    @nn.compact
    def __call__(self, x: Float[Array, "batch length M"], tokens: Tokens) -> Float[Array, "batch length M"]:
        """Maps every real token by its experts."""
        rows = self._rows(*x.shape[:2])
        groups = constrain(x.reshape(-1, rows * x.shape[1], x.shape[2]), "group", None, "embed")
        tokens = Tokens(*(each.reshape(groups.shape[:2]) for each in tokens))
        num_experts, size = self.expert.num_experts, groups.shape[1]
        capacity = size
        if self.capacity is not None:
            capacity = self.capacity(size, num_experts, self.router.choose.choices, self.has_rng("dropout"))
        routed = self.router(groups, tokens, num_experts, capacity)
        if self.capacity is None:
            if isinstance(routed.choices, ExpertSlots):
                raise UserError("SparseMlp.capacity is None (dropless), but experts that choose need a capacity")
            y, load, dropped = self._dropless(groups, routed.choices)
        else:
            y, load, dropped = self._within_capacity(groups, routed.choices, capacity)
        if self.is_mutable_collection(REPORTS):
            real = tokens.real.sum(axis=1).astype(jnp.float32)
            sums = [(each * real).sum() for each in routed[1:]]
            report = RouterReport(
                real.sum(), *sums, *(each.sum(axis=0).astype(jnp.float32) for each in (dropped, load))
            )
            self.put_variable(REPORTS, "report", report)
        return constrain(y, "group", None, "embed").reshape(x.shape)

    def _rows(self, batch: int, length: int) -> int:
        """Sequences in a group. A cached step has one token each: every row by itself, so that none is ever dropped."""
        if self.group_size is None or length == 1:
            return 1
        wanted, shards = max(self.group_size // length, 1), ways("group")
        rows = max(n for n in range(1, min(wanted, batch) + 1) if batch % n == 0)
        if batch // rows % shards:
            local = batch // shards
            fits = max((n for n in range(1, min(wanted, local) + 1) if local % n == 0), default=0)
            fix = f"set it to {fits * length}" if batch % shards == 0 else f"make the batch a multiple of {shards}"
            raise UserError(
                f"SparseMlp.group_size {self.group_size} makes {batch // rows} groups of {rows} sequences, which the "
                f"mesh splits {shards} ways; {fix}"
            )
        return rows

    def _within_capacity(
        self, x: Float[Array, "G S M"], choices: TokenChoices | ExpertSlots, capacity: int
    ) -> tuple[Float[Array, "G S M"], Int[Array, "G E"], Int[Array, " G"]]:
        """Output, load and dropped tokens."""
        slots = choices if isinstance(choices, ExpertSlots) else choices.slots(self.expert.num_experts, capacity)
        here, there = ("group", None, None, "embed"), ("experts", "group", "capacity", "embed")
        sent = constrain(constrain(slots.dispatch(x), *here).swapaxes(0, 1), *there)

        def multiply(rows: Array, kernel: Array) -> Array:
            return product("egci,eio->egco", rows, kernel).astype(rows.dtype)

        y = self.expert(sent, multiply, ("experts", "group", "capacity", "mlp"))
        returned = constrain(constrain(y, *there).swapaxes(0, 1), *here)
        return slots.combine(returned), slots.kept, slots.dropped

    def _dropless(
        self, x: Float[Array, "G S M"], choices: TokenChoices
    ) -> tuple[Float[Array, "G S M"], Int[Array, "_ E"], Int[Array, " _"]]:
        """The same without capacity: tokens of every shard sorted by expert, D shards in all."""
        shards, num_experts = ways("group"), self.expert.num_experts
        count = choices.experts.shape[1]

        def per_choice(values: Array) -> Array:
            return values.reshape(shards, -1, count, values.shape[-1]).swapaxes(1, 2).reshape(shards, count, -1)

        experts, gates = per_choice(choices.experts), per_choice(choices.gates)
        tokens = x.reshape(shards, -1, x.shape[-1])
        size = tokens.shape[1]
        real = choices.real.reshape(shards, size)
        order, starts = TokenChoices(experts, gates, None, real).sorted(num_experts)
        # What is not sent stands behind the last expert's tokens, where products may leave anything: it is not read.
        sent = jnp.arange(order.shape[1])[None] < starts[:, -1:]
        token = jnp.where(sent, order % size, size)
        place = jnp.where(experts < num_experts, jnp.argsort(order, axis=1).reshape(experts.shape), order.shape[1])
        sizes = jnp.diff(starts, axis=1)
        axes = ("group", None, None)

        def multiply(rows: Array, kernel: Array) -> Array:
            def ragged(rows: Array, kernel: Array, sizes: Array) -> Array:
                return jax.lax.ragged_dot(rows[0], kernel, sizes[0])[None]

            return per_shard(ragged, (axes, (None, None, None), axes[:2]), axes)(rows, kernel.astype(rows.dtype), sizes)

        y = self.expert(take_rows(tokens, token, place), multiply, axes)
        rows = take_rows(y, place.reshape(shards, -1), jnp.where(sent, order, order.shape[1])[:, None])
        rows = rows.reshape(*experts.shape, -1)
        gated = (rows * gates[..., None].astype(rows.dtype)).sum(axis=1)
        return gated.reshape(x.shape), sizes, jnp.zeros(shards, jnp.int32)
