"""A student that learns from a teacher: a Switch model into a dense one (Fedus et al. 2021, section 4.2)."""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_like.data.packing import FeatureConverter
from t5x_like.decoding.contract import Decoded, DecodeFn
from t5x_like.errors import UserError
from t5x_like.models.contract import LossAndMetrics, WeightedSum
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.typing import Array, Batch, Float, Params, PRNGKey, PyTree


@dataclasses.dataclass(frozen=True)
class DistilledModel:
    """A student trained on the data's targets and a teacher's probabilities; all else is the student's own.

    Its parameters are `student/...` and `teacher/...`, so that one checkpoint holds all that the run needs to go on.
    Give the optimiser a `freeze` for `teacher/.*`, which spares its state; `RestoreFrom` fills the teacher.

    Attributes:
      student: what is trained.
      teacher: what it learns from; routes and drops as in evaluation.
      soft_weight: share of the teacher's probabilities in the targets; 0.25 as in the paper.
    """

    student: EncoderDecoderModel
    teacher: EncoderDecoderModel
    soft_weight: float = 0.25

    def __post_init__(self) -> None:
        if not 0.0 <= self.soft_weight <= 1.0:
            raise UserError(f"DistilledModel.soft_weight is {self.soft_weight}; as a share it must lie in [0, 1]")

    def init(self, key: PRNGKey, batch: Batch) -> Params:
        """Fresh parameters of both."""
        return {"student": self.student.init(key, batch), "teacher": self.teacher.init(key, batch)}

    def logical_axes(self, batch: Batch) -> PyTree:
        """See `Model`."""
        return {"student": self.student.logical_axes(batch), "teacher": self.teacher.logical_axes(batch)}

    def loss(self, params: Params, batch: Batch, key: PRNGKey | None = None) -> LossAndMetrics:
        """The student's loss, `soft_weight` of it against the teacher's probabilities; logs the teacher's too."""
        logits, reports = self.student.forward(params["student"], batch, key)
        hard = self.student.loss_of(logits, reports, batch)
        teacher_logits, teacher_reports = self.teacher.forward(jax.lax.stop_gradient(params["teacher"]), batch)
        of_teacher = self.teacher.loss_of(teacher_logits, teacher_reports, batch).loss
        probabilities = jax.nn.softmax(teacher_logits)
        # The cross entropy, not the divergence: its gradient is the same, and soft_weight 0 and 1 compare.
        soft = -(probabilities * jax.nn.log_softmax(logits)).sum(axis=-1)
        weights = jnp.asarray(batch["decoder_loss_weights"], jnp.float32)
        soft_sum = WeightedSum((soft * weights).sum(), hard.loss.weight)
        total = (1.0 - self.soft_weight) * hard.loss.total + self.soft_weight * soft_sum.total
        metrics = hard.metrics | {"hard_loss": hard.loss, "soft_loss": soft_sum, "teacher_loss": of_teacher}
        return LossAndMetrics(hard.loss._replace(total=total), metrics)

    def logits(self, params: Params, batch: Batch, key: PRNGKey | None = None) -> Float[Array, "batch length vocab"]:
        """The student's."""
        return self.student.logits(params["student"], batch, key)

    def score(self, params: Params, batch: Batch) -> Float[Array, " batch"]:
        """The student's."""
        return self.student.score(params["student"], batch)

    def generate(
        self, params: Params, batch: Batch, decoder: DecodeFn, max_length: int, key: PRNGKey | None = None
    ) -> Decoded:
        """The student's."""
        return self.student.generate(params["student"], batch, decoder, max_length, key)

    @property
    def converter(self) -> FeatureConverter:
        """The student's."""
        return self.student.converter
