import jax
import jax.numpy as jnp
from tiny import LENGTHS, random_batch, tiny_model

from t5x_like.training.flops import matmul_flops


def test_products_count_twice_their_volume_and_loops_once_per_trip() -> None:
    a, b = jnp.zeros((3, 5)), jnp.zeros((5, 7))
    assert matmul_flops(jnp.matmul, a, b) == 2 * 3 * 5 * 7

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, x), None), x, None, length=11)[0]

    assert matmul_flops(loop, jnp.zeros((4, 4))) == 11 * 2 * 4**3


def test_a_t5_counts_what_its_matrices_say_scanned_or_not() -> None:
    rows, embed, inner, mlp, layers, vocab = 3, 16, 16, 32, 2, 64
    source, target = LENGTHS["inputs"], LENGTHS["targets"]
    cross = 2 * target * embed * inner + 2 * source * embed * inner + 2 * target * source * inner
    source_block, target_block = (
        4 * length * embed * inner + 2 * length * length * inner + 3 * length * embed * mlp
        for length in (source, target)
    )
    encoder, decoder = layers * source_block, layers * (target_block + cross)
    expected = 2 * rows * (encoder + decoder + target * embed * vocab)
    for model in (tiny_model(), tiny_model("SCAN_LAYERS=True", "REMAT='full'")):
        batch = random_batch(rows)
        params = jax.eval_shape(lambda model=model, batch=batch: model.init(jax.random.key(0), batch))
        assert matmul_flops(lambda p, model=model, batch=batch: model.loss(p, batch).loss.total, params) == expected
