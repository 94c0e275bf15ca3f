"""Which layers of a Switch Transformer are sparse, as Hugging Face counts them."""

from typing import NamedTuple

from t5x_like.architectures.stack import LayerStack
from t5x_like.architectures.transformer import DecoderLayer, EncoderLayer
from t5x_like.checkpoints.huggingface.family import stack_of
from t5x_like.errors import UserError
from t5x_like.layers.moe import SparseMlp
from t5x_like.layers.routing import FixedCapacity


def sparse_step(layers: object, sparse: object) -> int | None:
    """How transformers gets from numbers of layers to a step that the file does not name."""
    if not isinstance(layers, int) or not isinstance(sparse, int):
        return None
    return layers // sparse if sparse > 0 else layers  # which makes a sparse layer where none was asked for


def are_sparse(layers: int, step: int) -> list[bool]:
    """Which layers are sparse: in every `step` of them, the second."""
    return [step == 1 or (step > 1 and i % step == 1) for i in range(layers)]


def sparse_stack(layer: EncoderLayer | DecoderLayer, sparse: SparseMlp, layers: int, step: int) -> LayerStack:
    """Layers like `layer`, some of them with a sparse MLP."""
    return stack_of([layer.clone(mlp=sparse) if each else layer for each in are_sparse(layers, step)])


class SparseFields(NamedTuple):
    """Those fields of `T5Family` that sparse layers fill."""

    encoder_sparse_step: int
    decoder_sparse_step: int
    num_experts: int
    expert_capacity: int
    router_jitter_noise: float
    router_aux_loss_coef: float
    router_z_loss_coef: float


def sparse_fields(encoder: LayerStack, decoder: LayerStack) -> SparseFields | None:
    """What the sparse layers of both stacks fill; None, if there are none."""

    def step(stack: LayerStack) -> int:
        found = [isinstance(layer.mlp, SparseMlp) for layer in stack.pattern] * stack.repeats
        return next((n for n in range(len(found) + 1) if are_sparse(len(found), n) == found), 0)

    mlps = [layer.mlp for stack in (encoder, decoder) for layer in stack.pattern]
    sparse = next((mlp for mlp in mlps if isinstance(mlp, SparseMlp)), None)
    if sparse is None:
        return None
    if not isinstance(sparse.capacity, FixedCapacity):
        raise UserError(
            f"save: SparseMlp.capacity is {sparse.capacity}, but Hugging Face's is one number for sequences of any "
            "length; build the model with FixedCapacity(slots), the longest length if no token is to be dropped"
        )
    return SparseFields(
        step(encoder),
        step(decoder),
        sparse.expert.num_experts,
        sparse.capacity.slots,
        sparse.router.jitter_noise,
        sparse.router.balance_loss,
        sparse.router.z_loss,
    )
