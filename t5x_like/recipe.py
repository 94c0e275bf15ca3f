"""A training job as gin files and bindings describe it, before anything is built."""

import dataclasses
from collections.abc import Sequence

from t5x_like import gin_config
from t5x_like.data.loader import DatasetConfig
from t5x_like.models.contract import Model
from t5x_like.sharding import Partitioner
from t5x_like.training.trainer import Trainer
from t5x_like.typing import Batch

TRAIN = "t5x_like.commands.train.train"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `train` is given to train with, less its folder and what reads and writes there.

    Attributes: as the arguments of `train`.
    """

    model: Model
    dataset: DatasetConfig
    trainer: Trainer
    partitioner: Partitioner | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What `plan`, `verify` and `rehearse` look into: the files and bindings that `train` would be given.

    Attributes:
      files: as `--gin_file`.
      bindings: as `--gin.`, without that.
      search_paths: as `--gin_search_paths`.
      allow_imports: as `--allow_import`.
      other_verbs: dotted names of commands whose bindings the files may hold too.
    """

    files: Sequence[str]
    bindings: Sequence[str] = ()
    search_paths: Sequence[str] = ()
    allow_imports: Sequence[str] = ()
    other_verbs: Sequence[str] = ()

    def load(self, *bindings: str) -> gin_config.LoadedConfig:
        """The checked configuration of `train`; `bindings` override, and MODEL_DIR need not be given.

        Raises:
          UserError: a mistake in a file or binding.
        """
        asked = ["MODEL_DIR=runs/none", *self.bindings, *bindings]
        return gin_config.load(TRAIN, self.files, asked, self.search_paths, self.allow_imports, self.other_verbs)

    def build(self, *bindings: str) -> Experiment:
        """The objects that `train` would be called with; `bindings` override.

        Raises:
          UserError: a mistake in a file or binding, or parts that do not fit together.
        """
        experiment = gin_config.run(self.load(*bindings), instead=Experiment)
        assert isinstance(experiment, Experiment)
        return experiment

    def binds(self, parameter: str) -> bool:
        """Whether the files or bindings give `train` this argument."""
        config = self.load()
        return parameter in config.bound(config.command)

    def macro(self, name: str) -> object:
        """The value that a macro is defined as; None without one."""
        defined = self.load().bindings.get((name, "gin.macro"), {})
        return defined["value"].value if defined else None

    def arguments(self, *bindings: str) -> list[str]:
        """What stands behind `t5x_like VERB` on a command line; `bindings` override."""
        options = {"gin_file": self.files, "gin_search_paths": self.search_paths, "allow_import": self.allow_imports}
        given = [f"--{name}={value}" for name, values in options.items() for value in values]
        return [*given, *(f"--gin.{binding}" for binding in (*self.bindings, *bindings))]


def example_batch(model: Model, dataset: DatasetConfig, rows: int) -> Batch:
    """An empty batch of the right shapes: what parameters are initialised from and programs are traced with."""
    return model.converter.convert([[]] * rows, dataset.task_feature_lengths, dataset.pack)
