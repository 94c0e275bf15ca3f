"""The models of the shipped size files."""

import functools

from t5x_like import gin_config
from t5x_like.models.contract import Model


def identity(model: Model) -> Model:
    """A command of which a config is loaded for its model alone."""
    return model


@functools.cache
def model_of(name: str, *bindings: str) -> Model:
    """That of `configs/models/NAME.gin`; `bindings` as on the command line."""
    bindings = (f"{__name__}.identity.model=%MODEL", "DROPOUT_RATE=0.1", *bindings)
    return gin_config.run(gin_config.load(identity, [f"models/{name}.gin"], bindings))
