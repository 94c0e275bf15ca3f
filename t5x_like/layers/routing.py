"""Which expert computes which token. G groups, S tokens in each, E experts, C capacity (slots of an expert), K choices.

A router scores tokens in float32 and chooses; what it chose becomes `Slots`, a permutation of tokens into the experts'
slots and back. Nothing here multiplies by a one-hot matrix: tokens move by index.
"""

import dataclasses
import math
from typing import NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5x_like.errors import UserError
from t5x_like.layers.linear import Linear
from t5x_like.typing import Array, Bool, Float, Int, PRNGKey


class Tokens(NamedTuple):
    """What a sparse layer knows of its tokens besides their activations.

    Attributes:
      ids: token ids, which hash routing reads.
      real: False for padding, which is never routed and takes no capacity.
    """

    ids: Int[Array, "batch length"]
    real: Bool[Array, "batch length"]


# ---- Capacity: how many tokens an expert takes from a group


@runtime_checkable
class Capacity(Protocol):
    """Slots of every expert for one group."""

    def __call__(self, group_size: int, num_experts: int, choices: int, training: bool) -> int:
        """At most `group_size`, at least 1."""
        ...


@dataclasses.dataclass(frozen=True)
class CapacityFactor:
    """Slots for `factor` times the tokens that an expert gets from balanced routing (Fedus et al. 2021, eq. 3).

    Attributes:
      train: factor in training.
      evaluation: factor elsewhere; higher, since a dropped token costs quality and a free slot only time.
      minimum: slots that even a small group gets.
    """

    train: float = 1.25
    evaluation: float = 2.0
    minimum: int = 4

    def __call__(self, group_size: int, num_experts: int, choices: int, training: bool) -> int:
        """`ceil(group_size * choices * factor / num_experts)`, between `minimum` and the whole group."""
        factor = self.train if training else self.evaluation
        return min(max(math.ceil(group_size * choices * factor / num_experts), self.minimum), group_size)


@dataclasses.dataclass(frozen=True)
class FixedCapacity:
    """The same number of slots for every group, whatever its size."""

    slots: int

    def __call__(self, group_size: int, num_experts: int, choices: int, training: bool) -> int:
        """`slots`, or the whole group if that is smaller."""
        return min(self.slots, group_size)


# ---- Slots: tokens on their way to the experts and back


def _gather(x: Float[Array, "G R M"], index: Int[Array, "G ..."]) -> Float[Array, "G ... M"]:
    return jax.vmap(lambda rows, i: rows.at[i].get(mode="fill", fill_value=0))(x, index)


@jax.custom_vjp
def take_rows(
    x: Float[Array, "G R M"], index: Int[Array, "G I"], inverse: Int[Array, "G N R"]
) -> Float[Array, "G I M"]:
    """Rows `index` of `x`, group by group; zeros where an index is out of range.

    `inverse[g, :, r]` lists the places in `index[g]` that took row r, and is out of range where there are fewer than N.
    With it the gradient is a gather too, where differentiation would make a scatter.
    """
    return _gather(x, index)


def _take_rows_forward(x: Array, index: Array, inverse: Array) -> tuple[Array, Array]:
    return take_rows(x, index, inverse), inverse


def _take_rows_backward(inverse: Array, gradient: Array) -> tuple[Array, None, None]:
    return _gather(gradient, inverse).sum(axis=1), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@runtime_checkable
class Slots(Protocol):
    """Tokens of a group in the slots of the experts."""

    def dispatch(self, x: Float[Array, "G S M"]) -> Float[Array, "G E C M"]:
        """Every slot's token; zeros in empty slots."""
        ...

    def combine(self, y: Float[Array, "G E C M"]) -> Float[Array, "G S M"]:
        """For every token the gated sum of what its experts made of it; zero for a dropped one."""
        ...

    @property
    def kept(self) -> Int[Array, "G E"]:
        """Slots that hold a token."""
        ...

    @property
    def dropped(self) -> Int[Array, " G"]:
        """Real tokens that no expert took."""
        ...


class TokenSlots(NamedTuple):
    """Slots where every token has at most K places.

    Attributes:
      gates: [G, K, S], float32.
      slot: of every choice, e * C + c; E * C where the choice was dropped.
      choice: in every slot, k * S + s; K * S where the slot is empty.
      real: tokens that are not padding.
    """

    gates: Float[Array, "G K S"]
    slot: Int[Array, "G K S"]
    choice: Int[Array, "G E C"]
    real: Bool[Array, "G S"]

    def dispatch(self, x: Float[Array, "G S M"]) -> Float[Array, "G E C M"]:
        """See `Slots`."""
        (groups, experts, capacity), (_, choices, size) = self.choice.shape, self.gates.shape
        choice = self.choice.reshape(groups, -1)
        token = jnp.where(choice < choices * size, choice % size, size)
        return take_rows(x, token, self.slot).reshape(groups, experts, capacity, -1)

    def combine(self, y: Float[Array, "G E C M"]) -> Float[Array, "G S M"]:
        """See `Slots`."""
        groups, choices, size = self.slot.shape
        y = y.reshape(groups, -1, y.shape[-1])
        rows = take_rows(y, self.slot.reshape(groups, -1), self.choice.reshape(groups, 1, -1))
        return (rows.reshape(groups, choices, size, -1) * self.gates[..., None].astype(y.dtype)).sum(axis=1)

    @property
    def kept(self) -> Int[Array, "G E"]:
        """See `Slots`."""
        return (self.choice < self.slot.shape[1] * self.slot.shape[2]).sum(axis=2)

    @property
    def dropped(self) -> Int[Array, " G"]:
        """See `Slots`."""
        nowhere = (self.slot == self.choice.shape[1] * self.choice.shape[2]).all(axis=1)
        return (nowhere & self.real).sum(axis=1)


class ExpertSlots(NamedTuple):
    """Slots filled by the experts themselves: a token may sit in many of them, or in none.

    Attributes:
      gates: [G, E, C], float32.
      token: in every slot; S where the slot is empty.
      real: tokens that are not padding.
    """

    gates: Float[Array, "G E C"]
    token: Int[Array, "G E C"]
    real: Bool[Array, "G S"]

    def dispatch(self, x: Float[Array, "G S M"]) -> Float[Array, "G E C M"]:
        """See `Slots`."""
        return _gather(x, self.token)

    def combine(self, y: Float[Array, "G E C M"]) -> Float[Array, "G S M"]:
        """See `Slots`; the sum has no bound on its terms, so this one is a scatter."""
        gated = y * self.gates[..., None].astype(y.dtype)
        zeros = jnp.zeros((*self.real.shape, y.shape[-1]), y.dtype)
        return jax.vmap(lambda zeros, i, rows: zeros.at[i].add(rows, mode="drop"))(zeros, self.token, gated)

    @property
    def kept(self) -> Int[Array, "G E"]:
        """See `Slots`."""
        return (self.token < self.real.shape[1]).sum(axis=2)

    @property
    def dropped(self) -> Int[Array, " G"]:
        """See `Slots`."""
        zeros = jnp.zeros(self.real.shape, bool)
        taken = jax.vmap(lambda zeros, i: zeros.at[i].set(True, mode="drop"))(zeros, self.token)
        return (self.real & ~taken).sum(axis=1)


class TokenChoices(NamedTuple):
    """K experts for every token.

    Attributes:
      experts: E where a token is not to be sent: padding, or a choice that the router gave up.
      gates: what the expert's output is multiplied with, float32.
      priority: the higher, the earlier a token gets its slot; None serves tokens as they stand in the group.
      real: tokens that are not padding.
    """

    experts: Int[Array, "G K S"]
    gates: Float[Array, "G K S"]
    priority: Float[Array, "G S"] | None
    real: Bool[Array, "G S"]

    def slots(self, num_experts: int, capacity: int) -> TokenSlots:
        """Fills slots: all first choices, then all second ones, until an expert is full; the rest is dropped."""
        groups, choices, size = self.experts.shape
        experts = self.experts.reshape(groups, -1)
        order, starts = self.sorted(num_experts)
        # Slot c of expert e holds the c-th of its choices in sorted order.
        place = starts[:, :-1, None] + jnp.arange(capacity, dtype=jnp.int32)[None, None]
        choice = jnp.take_along_axis(order, place.reshape(groups, -1), axis=1, mode="clip").reshape(place.shape)
        choice = jnp.where(place < starts[:, 1:, None], choice, choices * size)
        rank = jnp.argsort(order, axis=1).astype(jnp.int32) - jnp.take_along_axis(starts, experts, axis=1)
        full = (rank >= capacity) | (experts >= num_experts)
        slot = jnp.where(full, num_experts * capacity, experts * capacity + rank)
        return TokenSlots(self.gates, slot.reshape(groups, choices, size), choice, self.real)

    def sorted(self, num_experts: int) -> tuple[Int[Array, "G KS"], Int[Array, "G _"]]:
        """The choices in order of expert and precedence; where each expert's begin, and the last one's end."""
        groups, choices, size = self.experts.shape
        experts = self.experts.reshape(groups, -1)
        keys = [experts]
        if self.priority is not None:
            last = jnp.repeat(jnp.arange(choices, dtype=jnp.int32), size)
            keys += [jnp.broadcast_to(last[None], experts.shape), -jnp.tile(self.priority, (1, choices))]
        numbers = jax.lax.broadcasted_iota(jnp.int32, experts.shape, 1)
        *_, order = jax.lax.sort((*keys, numbers), dimension=1, is_stable=True, num_keys=len(keys))
        counts = jax.nn.one_hot(experts, num_experts, dtype=jnp.int32).sum(axis=1)
        return order, jnp.pad(jnp.cumsum(counts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


# ---- Choosing from probabilities


@runtime_checkable
class Choose(Protocol):
    """Turns router probabilities into choices."""

    @property
    def causal(self) -> bool:
        """Whether a token's expert never depends on the tokens behind it."""
        ...

    @property
    def choices(self) -> int:
        """Experts per token, as far as capacity is concerned."""
        ...

    def __call__(
        self, probabilities: Float[Array, "G S E"], real: Bool[Array, "G S"], capacity: int, key: PRNGKey | None
    ) -> TokenChoices | ExpertSlots:
        """Chooses; with a `key`, as in training."""
        ...


@dataclasses.dataclass(frozen=True)
class TopK:
    """Every token goes to its likeliest experts: with one, a Switch layer (Fedus et al. 2021, eq. 1 and 2).

    All first choices are served before any second one, as in GShard. In a group of several sequences, or with several
    choices, whether a token is dropped may so depend on tokens behind it; where it goes, and what comes out, does not.

    Attributes:
      choices: K.
      normalize: divide a token's gates by their sum (Lepikhin et al. 2021). One choice then has a gate of 1, and its
        router learns from auxiliary losses alone.
      second_threshold: ST-MoE's second-expert policy (Zoph et al. 2022): in training, a choice after the first is kept
        with probability min(1, gate / threshold). None keeps all, and so does evaluation.
      prioritize: serve the most confident tokens first (batch prioritized routing; Riquelme et al. 2021), not causal.
    """

    choices: int = 1
    normalize: bool = False
    second_threshold: float | None = None
    prioritize: bool = False

    @property
    def causal(self) -> bool:
        """See `Choose`."""
        return not self.prioritize

    def __call__(
        self, probabilities: Float[Array, "G S E"], real: Bool[Array, "G S"], capacity: int, key: PRNGKey | None
    ) -> TokenChoices:
        """See `Choose`."""
        num_experts = probabilities.shape[-1]
        if not 1 <= self.choices <= num_experts:
            raise UserError(f"TopK.choices is {self.choices}; with {num_experts} experts it must be 1 to {num_experts}")
        gates, experts = top_k(probabilities, self.choices)
        priority = gates[:, 0] if self.prioritize else None
        if self.normalize:
            gates /= gates.sum(axis=1, keepdims=True).clip(1e-9)
        sent = jnp.broadcast_to(real[:, None], experts.shape)
        if self.second_threshold is not None and key is not None:
            chance = (gates / self.second_threshold).at[:, 0].set(1.0)
            sent &= jax.random.uniform(key, gates.shape) < chance
        return TokenChoices(jnp.where(sent, experts, num_experts), gates, priority, real)


def top_k(probabilities: Float[Array, "G S E"], k: int) -> tuple[Float[Array, "G K S"], Int[Array, "G K S"]]:
    """The k largest probabilities of each token and whose they are; ties go to the lower number, as in `lax.top_k`.

    One maximum after another: k is small, and XLA's CPU and TPU sort all experts for a `top_k`.
    """
    left, best = probabilities, []
    for _ in range(k):
        best.append(jnp.argmax(left, axis=-1).astype(jnp.int32))
        left = jnp.where(jax.nn.one_hot(best[-1], left.shape[-1], dtype=bool), -1.0, left)
    experts = jnp.stack(best, axis=1)
    chosen = [jnp.take_along_axis(probabilities, expert[..., None], axis=-1)[..., 0] for expert in best]
    return jnp.stack(chosen, axis=1), experts


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """Every expert takes the tokens that score highest with it (Zhou et al. 2022): perfect balance, and not causal.

    The capacity factor is then the mean number of experts per token.
    """

    @property
    def causal(self) -> bool:
        """No: a token's experts depend on all others."""
        return False

    @property
    def choices(self) -> int:
        """1: the capacity factor counts them."""
        return 1

    def __call__(
        self, probabilities: Float[Array, "G S E"], real: Bool[Array, "G S"], capacity: int, key: PRNGKey | None
    ) -> ExpertSlots:
        """See `Choose`."""
        scores = jnp.where(real[..., None], probabilities, -1.0).swapaxes(1, 2)
        token = jnp.argsort(-scores, axis=-1)[..., :capacity]  # XLA splits a sort over groups, but no top_k
        gates = jnp.take_along_axis(scores, token, axis=-1)
        empty = gates < 0
        return ExpertSlots(jnp.where(empty, 0.0, gates), jnp.where(empty, real.shape[1], token), real)


# ---- Routers: modules from activations to choices


class Routed(NamedTuple):
    """What a router says of the groups.

    Attributes:
      choices: where tokens go.
      loss: the auxiliary losses, weighted and added up: what training is to add to its own loss.
      balance_loss: 1 where routing is perfectly balanced.
      z_loss: mean of logsumexp(logits)**2.
      entropy: mean over tokens of the entropy of the router's distribution, in nats.
      confidence: mean over tokens of its largest probability.
    """

    choices: TokenChoices | ExpertSlots
    loss: Float[Array, " G"]
    balance_loss: Float[Array, " G"]
    z_loss: Float[Array, " G"]
    entropy: Float[Array, " G"]
    confidence: Float[Array, " G"]


class Router(nn.Module):
    """A softmax over experts, in float32 whatever the activations are (Fedus et al. 2021, "selective precision").

    Attributes:
      choose: from probabilities to choices.
      jitter_noise: in training, inputs are multiplied by uniform noise in 1 +- this.
      balance_loss: weight of the load-balancing loss (Fedus et al. 2021, eq. 4); f counts dropped tokens too.
      z_loss: weight of the router z-loss (Zoph et al. 2022, eq. 5).
      init_scale: of the truncated normal that weights are drawn from: its variance is this over embed_dim.
    """

    choose: Choose = TopK()
    jitter_noise: float = 1e-2
    balance_loss: float = 1e-2
    z_loss: float = 0.0
    init_scale: float = 0.1

    @nn.compact
    def __call__(self, x: Float[Array, "G S M"], tokens: Tokens, num_experts: int, capacity: int) -> Routed:
        """Routes groups of tokens.

        Args:
          x: activations.
          tokens: their ids and which are real, [G, S] each.
          num_experts: E.
          capacity: C, for routers whose experts choose.
        """
        training = self.has_rng("dropout")
        x = x.astype(jnp.float32)
        if training and self.jitter_noise > 0:
            x *= jax.random.uniform(
                self.make_rng("dropout"), x.shape, x.dtype, 1 - self.jitter_noise, 1 + self.jitter_noise
            )
        init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "truncated_normal")
        logits = Linear((num_experts,), ("embed", None), kernel_init=init, name="router_weights")(x)
        probabilities = jax.nn.softmax(logits)
        key = self.make_rng("dropout") if training else None
        choices = self.choose(probabilities, tokens.real, capacity, key)

        real = tokens.real.astype(jnp.float32)
        share = real / real.sum(axis=1, keepdims=True).clip(1.0)

        def mean(values: Float[Array, "G S"]) -> Float[Array, " G"]:
            return (values * share).sum(axis=1)

        favourite = jax.nn.one_hot(jnp.argmax(probabilities, axis=-1), num_experts)
        f = (favourite * share[..., None]).sum(axis=1)
        p = (probabilities * share[..., None]).sum(axis=1)
        balance_loss = num_experts * (f * p).sum(axis=1)
        z_loss = mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
        loss = self.balance_loss * balance_loss + self.z_loss * z_loss
        entropy = -(probabilities * jax.nn.log_softmax(logits)).sum(axis=-1)
        return Routed(choices, loss, balance_loss, z_loss, mean(entropy), mean(probabilities.max(axis=-1)))


class HashRouter(nn.Module):
    """Sends every occurrence of a token to the same expert, drawn once for each id (Roller et al. 2021): the control.

    Attributes:
      seed: of the draw.
    """

    seed: int = 0

    @property
    def choose(self) -> Choose:
        """One expert per token, and causal."""
        return TopK()

    def __call__(self, x: Float[Array, "G S M"], tokens: Tokens, num_experts: int, capacity: int) -> Routed:
        """See `Router`; nothing is learned, so losses are 0, and no doubt is left."""
        mixed = tokens.ids.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + jnp.uint32(self.seed)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finaliser of MurmurHash3
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        expert = ((mixed ^ (mixed >> 16)) % num_experts).astype(jnp.int32)
        experts = jnp.where(tokens.real, expert, num_experts)[:, None]
        zeros = jnp.zeros(len(experts), jnp.float32)
        choices = TokenChoices(experts, jnp.ones(experts.shape, jnp.float32), None, tokens.real)
        return Routed(choices, zeros, zeros, zeros, zeros, zeros + 1.0)
