"""A trained model in three lines of Python: load anything, look at logits, score, generate, fine-tune."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import seqio

from t5x_like import gin_config
from t5x_like.checkpoints import huggingface
from t5x_like.checkpoints.manager import Checkpoints
from t5x_like.checkpoints.restore import restore_parameters
from t5x_like.data import metrics, texts
from t5x_like.data.loader import DatasetConfig, host_to_devices, weighted_tasks
from t5x_like.data.packing import Example
from t5x_like.data.texts import Vocabularies
from t5x_like.data.tokenizer_files import tokenizer_vocabulary
from t5x_like.data.vocabularies import sentencepiece_vocabulary, special_tokens
from t5x_like.decoding.beam import BeamSearch
from t5x_like.decoding.contract import DecodeFn
from t5x_like.decoding.greedy import Greedy
from t5x_like.decoding.sampling import Sampling
from t5x_like.errors import UserError
from t5x_like.models.contract import Model
from t5x_like.models.masked_lm import MaskedLMModel
from t5x_like.models.predictor import Predictor
from t5x_like.sharding import Partitioner
from t5x_like.training import train_state
from t5x_like.training.optimizers import adafactor
from t5x_like.training.step import TrainStep
from t5x_like.training.train_state import TrainState
from t5x_like.typing import Float, Params

ROWS = 32
"""Texts go in batches of at most so many rows; sizes are padded, so that few programs are compiled."""


class Parts(NamedTuple):
    """What a run's config says of its model; bound by `configs/runs/interactive.gin`."""

    model: Model
    dataset: DatasetConfig


@dataclasses.dataclass
class InteractiveModel:
    """A model, its parameters and its vocabulary.

    Attributes:
      model: the network's pure functions.
      params: its parameters.
      vocabulary: of inputs and targets; None where a Hugging Face folder came without one.
      target_vocabulary: of targets, where that is another, such as a classifier's labels.
      partitioner: where it runs; all local work is done on one device by default.
    """

    model: Model
    params: Params
    vocabulary: seqio.Vocabulary | None = None
    target_vocabulary: seqio.Vocabulary | None = None
    partitioner: Partitioner = dataclasses.field(default_factory=Partitioner.single_device)

    def __post_init__(self) -> None:
        self._predictor = Predictor(self.model, self.partitioner)

    @classmethod
    def load(cls, path: str | Path, allow_imports: Sequence[str] = ()) -> "InteractiveModel":
        """Loads a run's folder (its newest checkpoint), one of its checkpoints, or a Hugging Face folder.

        Args:
          path: `runs/first`, `runs/first/checkpoints/1000`, or a folder with `config.json` and `model.safetensors`.
          allow_imports: packages that the run's config imports besides the trusted ones.

        Raises:
          UserError: `path` is none of these, or its parts do not fit together.
        """
        path = Path(path)
        if (path / "config.json").is_file():
            return cls._from_huggingface(path)
        run, step = (path, None) if (path / "config.gin").is_file() else (path.parent.parent, path.name)
        if not (run / "config.gin").is_file() or not (step is None or step.isdigit()):
            raise UserError(
                f"{path}: neither a run's folder (config.gin), nor one of its checkpoints (checkpoints/STEP), "
                "nor a Hugging Face folder (config.json)"
            )
        files = ["runs/interactive.gin", str(run / "config.gin")]
        config = gin_config.load(Parts, files, allow_imports=allow_imports, roots=["t5x_like.commands.train.train"])
        parts = gin_config.run(config)
        assert isinstance(parts, Parts)
        partitioner = Partitioner.single_device()
        with Checkpoints(run / "checkpoints") as checkpoints:
            steps = checkpoints.steps()
            wanted = int(step) if step else max(steps, default=None)
            if wanted not in steps:
                raise UserError(f"{path}: no such checkpoint; the run has {', '.join(map(str, steps)) or 'none'}")
            batch = parts.model.converter.convert([[]], parts.dataset.task_feature_lengths, packed=False)
            params = restore_parameters(checkpoints, wanted, parts.model, batch, partitioner)
        features = weighted_tasks(parts.dataset)[0].task.output_features
        return cls(parts.model, params, features["inputs"].vocabulary, features["targets"].vocabulary, partitioner)

    @classmethod
    def _from_huggingface(cls, path: Path) -> "InteractiveModel":
        loaded = huggingface.load(path)
        vocabulary, model = _vocabulary_in(path), loaded.model
        if vocabulary is not None and isinstance(model, MaskedLMModel):
            model = dataclasses.replace(model, mask_id=special_tokens(vocabulary).mask)  # no config.json knows it
        return cls(model, loaded.params, vocabulary)

    def logits(self, batch: Mapping[str, np.ndarray]) -> Float[np.ndarray, "batch length vocab"]:
        """Float32 logits: of every next token, of every token, or of classes, as the model has them.

        Args:
          batch: `[batch, length]` each. Encoder-decoders read seqio's `encoder_input_tokens` and
            `decoder_input_tokens`, decoders the latter (and segment ids where rows are packed); encoders
            `encoder_input_tokens`, `segment_ids` (BERT's token types) and `global_attention_mask` (Longformer); XLNet
            `input_tokens`, `perm_mask` and `target_mapping`. The model's padding id is not attended to.
        """
        return self._predictor.logits(self.params, {name: np.asarray(rows) for name, rows in batch.items()})

    def generate(
        self,
        inputs: Sequence[str],
        num_beams: int = 1,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        max_length: int = 128,
        seed: int = 0,
    ) -> list[str]:
        """The best output for each input: greedy, unless beams or any of the sampling options are asked for.

        A classifier's output is its label; it searches nothing.

        Args:
          inputs: as the model was trained on, prefix included.
          num_beams: more than 1 is beam search (with a length penalty of 0.6).
          temperature: divides logits before drawing; giving it, `top_k` or `top_p` means sampling.
          top_k: draw from so many of the likeliest tokens; 0 from all.
          top_p: draw from the fewest tokens that have this probability together.
          max_length: tokens of an output at most.
          seed: of the draws.

        Raises:
          UserError: beams and sampling are both asked for, or there is no vocabulary.
        """
        sampled = temperature is not None or top_k > 0 or top_p < 1.0
        if sampled and num_beams > 1:
            raise UserError("generate: num_beams > 1 searches, temperature, top_k and top_p draw; ask for one of them")
        decoder: DecodeFn = BeamSearch(num_beams) if num_beams > 1 else Greedy()
        if sampled:
            decoder = Sampling(1.0 if temperature is None else float(temperature), top_k, float(top_p))
        vocabulary, outputs = self._vocabularies().targets, []
        for number, start in enumerate(range(0, len(inputs), ROWS)):
            part = inputs[start : start + ROWS]
            batch = self._batch([(text, "") for text in part])
            key = jax.random.fold_in(jax.random.key(seed), number)
            tokens, _ = self._predictor.generate(self.params, batch, decoder, max_length, key)
            outputs += [vocabulary.decode(row.tolist()) for row in tokens[: len(part), 0]]
        return outputs

    def score(self, inputs: Sequence[str], targets: Sequence[str]) -> Float[np.ndarray, " batch"]:
        """Log-likelihood of each target given its input, end token included, in nats.

        A masked language model's is a pseudo-log-likelihood: the sum over tokens, each masked alone (Salazar et al.
        2020), without an end token.

        Raises:
          UserError: there are not as many targets as inputs, or there is no vocabulary.
        """
        if len(inputs) != len(targets):
            raise UserError(f"score: {len(inputs)} inputs but {len(targets)} targets")
        pairs = list(zip(inputs, targets, strict=True))
        scores = [np.zeros(0, np.float32)]
        for start in range(0, len(pairs), ROWS):
            part = pairs[start : start + ROWS]
            scores.append(self._predictor.score(self.params, self._batch(part))[: len(part)])
        return np.concatenate(scores)

    def perplexity(self, texts: Sequence[str], inputs: Sequence[str] | None = None) -> float:
        """Perplexity per token of all texts together, given their inputs (None: given nothing).

        A masked language model's is a pseudo-perplexity, see `score`.

        Raises:
          UserError: there are no texts, not as many inputs as texts, or there is no vocabulary.
        """
        inputs = [""] * len(texts) if inputs is None else inputs
        rows = self._rows(list(zip(inputs, texts, strict=False)))
        return metrics.perplexity(self.score(inputs, texts), [len(row["targets"]) for row in rows])

    def fit(
        self,
        pairs: Sequence[tuple[str, str]],
        steps: int,
        batch_size: int = ROWS,
        optimizer: optax.GradientTransformation | None = None,
        seed: int = 0,
    ) -> list[float]:
        """Fine-tunes `params` on (input, target) pairs, in an order drawn anew for every pass.

        Args:
          pairs: at least one.
          steps: updates.
          batch_size: pairs in each.
          optimizer: None is Adafactor at T5's fine-tuning rate, 0.001. Its state starts afresh with every call.
          seed: of the order and of dropout.

        Returns:
          The loss of every step.
        """
        if not pairs:
            raise UserError("fit: no pairs to train on")
        optimizer = optimizer or adafactor(1e-3)
        tokens = self._rows(pairs)
        lengths = {name: _padded(max(len(row[name]) for row in tokens)) for name in ("inputs", "targets")}
        batch = self.model.converter.convert([[]] * batch_size, lengths, packed=False)
        shardings = train_state.state_shardings(self.model, optimizer, batch, self.partitioner)
        step = TrainStep(self.model, optimizer, seed).compiled(self.partitioner, shardings)
        params = jax.tree.map(jnp.copy, self.params)  # the step reuses its state's memory
        state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
        order = itertools.chain.from_iterable(
            np.random.default_rng((seed, epoch)).permutation(len(pairs)) for epoch in itertools.count()
        )
        losses = []
        for _ in range(steps):
            rows = [[tokens[index]] for index in itertools.islice(order, batch_size)]
            batch = self.model.converter.convert(rows, lengths, packed=False)
            state, report = step(
                jax.device_put(state, shardings), host_to_devices(batch, self.partitioner.sharding("batch"))
            )
            losses.append(float(report.scalars["loss"]))
        self.params = state.params
        return losses

    def _vocabularies(self) -> Vocabularies:
        if self.vocabulary is None:
            raise UserError(
                "this model has no vocabulary; set `.vocabulary`, e.g. to sentencepiece_vocabulary('spiece.model')"
            )
        return Vocabularies(self.vocabulary, self.target_vocabulary or self.vocabulary)

    def _rows(self, pairs: Sequence[tuple[str, str]]) -> list[Example]:
        vocabularies = self._vocabularies()
        return [texts.example(self.model.converter, *pair, vocabularies) for pair in pairs]

    def _batch(self, pairs: Sequence[tuple[str, str]]) -> dict[str, np.ndarray]:
        rows = self._rows(pairs)
        lengths = {name: _padded(max(len(row[name]) for row in rows)) for name in ("inputs", "targets")}
        padding: list[list[Example]] = [[]] * (_padded(len(rows)) - len(rows))
        return self.model.converter.convert([[row] for row in rows] + padding, lengths, packed=False)


def _vocabulary_in(folder: Path) -> seqio.Vocabulary | None:
    """The vocabulary that a Hugging Face folder came with."""
    if (folder / "tokenizer.json").is_file() and not (folder / "spiece.model").is_file():
        return tokenizer_vocabulary(str(folder / "tokenizer.json"))
    if (folder / "vocab.txt").is_file():
        return tokenizer_vocabulary(str(folder / "vocab.txt"))
    pieces = folder / "spiece.model"
    return sentencepiece_vocabulary(str(pieces)) if pieces.is_file() else None


def _padded(size: int) -> int:
    """The next power of two, beyond 128 the next multiple of it."""
    return 1 << max(size - 1, 0).bit_length() if size <= 128 else -(-size // 128) * 128
