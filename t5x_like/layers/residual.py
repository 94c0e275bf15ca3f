"""How a sublayer joins the residual stream: behind a norm, or in front of one."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Protocol, TypeAlias, runtime_checkable

from t5x_like.typing import Array, Float

Stream: TypeAlias = Float[Array, "batch length embed"]


@runtime_checkable
class Residual(Protocol):
    """Adds what a sublayer makes of `x` to it; `prefix` begins the name of the norm."""

    prefix: ClassVar[str]

    def __call__(
        self, x: Stream, norm: Callable[..., Stream], sublayer: Callable[..., Stream], dropout: Callable[..., Stream]
    ) -> Stream:
        """The new stream."""
        ...


@dataclasses.dataclass(frozen=True)
class PreNorm:
    """`x + f(norm(x))`: T5, GPT-2 and all that is deep (Xiong et al. 2020). The stack needs a norm at its end."""

    prefix: ClassVar[str] = "pre"

    def __call__(
        self, x: Stream, norm: Callable[..., Stream], sublayer: Callable[..., Stream], dropout: Callable[..., Stream]
    ) -> Stream:
        """See `Residual`."""
        return x + dropout(sublayer(norm(x)))


@dataclasses.dataclass(frozen=True)
class PostNorm:
    """`norm(x + f(x))`: the first Transformer (Vaswani et al. 2017, section 3.1), BERT, XLNet."""

    prefix: ClassVar[str] = "post"

    def __call__(
        self, x: Stream, norm: Callable[..., Stream], sublayer: Callable[..., Stream], dropout: Callable[..., Stream]
    ) -> Stream:
        """See `Residual`."""
        return norm(x + dropout(sublayer(x)))
