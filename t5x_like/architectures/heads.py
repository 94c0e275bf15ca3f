"""What stands on an encoder: `head(hidden, attend, positions)`; `attend` gives logits from the embedding table."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Initializer

from t5x_like.layers.dropout import Dropout
from t5x_like.layers.linear import Linear, Normal
from t5x_like.layers.logits import LazyLogits
from t5x_like.layers.mlp import ACTIVATIONS
from t5x_like.layers.norms import LayerNorm
from t5x_like.typing import Array, Float, Int

Attended: TypeAlias = Callable[[Float[Array, "batch targets embed"]], LazyLogits]
Hidden: TypeAlias = Float[Array, "batch length embed"]
Positions: TypeAlias = Int[Array, "batch targets"] | None


class MaskedLogits(NamedTuple):
    """What pre-training predicts.

    Attributes:
      tokens: logits of the token at every target position.
      next_sentence: logits that the second segment follows the first (class 0) or not (1); None without such a head.
    """

    tokens: LazyLogits | Float[Array, "batch targets vocab"]
    next_sentence: Float[Array, "batch 1 2"] | None


class NoHead(nn.Module):
    """Hidden states as they are: an encoder alone, such as texts are compared with."""

    def __call__(
        self, hidden: Hidden, attend: Attended, positions: Positions = None
    ) -> Float[Array, "batch length embed"]:
        """`hidden`."""
        return hidden


class MaskedLanguageModelHead(nn.Module):
    """A dense layer with a norm, then the embedding table (Devlin et al. 2019; Liu et al. 2019).

    Attributes:
      activation: of the dense layer.
      norm: behind it.
      next_sentence: a `ClassificationHead` with two classes; None: no such objective.
      kernel_init: draws the dense layer.
      dtype: of the product.
    """

    activation: str = "gelu_exact"
    norm: nn.Module = LayerNorm(1e-12)
    next_sentence: nn.Module | None = None
    kernel_init: Initializer = Normal()
    dtype: str = "float32"

    @nn.compact
    def __call__(self, hidden: Hidden, attend: Attended, positions: Positions = None) -> MaskedLogits:
        """Logits at `positions` (everywhere, if None): the only ones that are computed."""
        chosen = hidden if positions is None else jnp.take_along_axis(hidden, positions[..., None], axis=1)
        transform = _dense(self, "transform", hidden.shape[-1])
        x = self.norm(ACTIVATIONS[self.activation](transform(chosen)))
        follows = None if self.next_sentence is None else self.next_sentence(hidden, attend)
        return MaskedLogits(attend(x), follows)


class ClassificationHead(nn.Module):
    """Classes of a whole sequence, from its first token: a dense layer (BERT's pooler) and a projection.

    Attributes:
      num_classes: 1 where choices compete, see `MultipleChoiceHead`.
      dropout_rate: in front of the projection.
      kernel_init: draws both matrices.
      dtype: of the dense layer; logits are float32.
    """

    num_classes: int
    dropout_rate: float = 0.0
    kernel_init: Initializer = Normal()
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, hidden: Hidden, attend: Attended, positions: Positions = None
    ) -> Float[Array, "batch 1 num_classes"]:
        """Logits; `positions` are not asked for."""
        pooled = jnp.tanh(_dense(self, "pooler", hidden.shape[-1])(hidden[:, :1]))
        return _logits(self, self.num_classes)(Dropout(self.dropout_rate)(pooled))


class TokenClassificationHead(nn.Module):
    """Classes of every token; attributes as in `ClassificationHead`."""

    num_classes: int
    dropout_rate: float = 0.0
    kernel_init: Initializer = Normal()

    @nn.compact
    def __call__(
        self, hidden: Hidden, attend: Attended, positions: Positions = None
    ) -> Float[Array, "batch length num_classes"]:
        """Logits of every token."""
        return _logits(self, self.num_classes)(Dropout(self.dropout_rate)(hidden))


class SpanHead(nn.Module):
    """Where an answer begins and ends: two distributions over positions (Devlin et al. 2019, section 4.2)."""

    kernel_init: Initializer = Normal()

    @nn.compact
    def __call__(self, hidden: Hidden, attend: Attended, positions: Positions = None) -> Float[Array, "batch 2 length"]:
        """Logits of the start and of the end."""
        return _logits(self, 2)(hidden).swapaxes(1, 2)


def _dense(head: nn.Module, name: str, features: int) -> Linear:
    axes = ("embed", None)
    return Linear((features,), axes, kernel_init=head.kernel_init, dtype=head.dtype, use_bias=True, name=name)


def _logits(head: nn.Module, classes: int) -> Linear:
    return Linear((classes,), ("embed", None), kernel_init=head.kernel_init, use_bias=True, name="logits")
