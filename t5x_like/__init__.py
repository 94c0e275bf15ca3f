"""T5, Switch Transformers and their relatives in JAX: gin, seqio, Flax Linen and Orbax."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t5x_like.interactive import InteractiveModel

__version__ = "0.1.0"
__all__ = ["InteractiveModel", "__version__"]


def __getattr__(name: str) -> object:
    """Imports JAX only when `InteractiveModel` is asked for, so that `t5x_like --help` answers at once."""
    if name == "InteractiveModel":
        from t5x_like.interactive import InteractiveModel

        return InteractiveModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
