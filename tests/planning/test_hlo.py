"""Programs read from XLA's text: written out by hand, and compiled here for sums that are known."""

import jax
import jax.numpy as jnp
import pytest

from t5x_like.planning import hlo

LOOP = """\
HloModule jit_f, is_scheduled=true

%fused (param_0: bf16[8,128], param_1: f32[5,8,64], param_2: s32[]) -> f32[5,8,64] {
  %param_0 = bf16[8,128]{1,0} parameter(0)
  %param_1 = f32[5,8,64]{2,1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %weights = bf16[128,64]{1,0} constant({...})
  %convolution.1 = f32[8,64]{1,0} convolution(%param_0, %weights), dim_labels=bf_io->bf
  %bitcast.1 = f32[1,8,64]{2,1,0} bitcast(%convolution.1)
  %zero = s32[] constant(0)
  %same = f32[5,8,64]{2,1,0} bitcast(%param_1)
  ROOT %dynamic-update-slice.1 = f32[5,8,64]{2,1,0} dynamic-update-slice(%same, %bitcast.1, %param_2, %zero, %zero)
}

%condition (state: (s32[], bf16[8,128], f32[5,8,64])) -> pred[] {
  %state.1 = (s32[], bf16[8,128]{1,0}, f32[5,8,64]{2,1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%state.1), index=0
  %bound = s32[] constant(5)
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}

%body (state: (s32[], bf16[8,128], f32[5,8,64])) -> (s32[], bf16[8,128], f32[5,8,64]) {
  %state.2 = (s32[], bf16[8,128]{1,0}, f32[5,8,64]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state.2), index=0
  %x = bf16[8,128]{1,0} get-tuple-element(%state.2), index=1
  %ys = f32[5,8,64]{2,1,0} get-tuple-element(%state.2), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %reduced = bf16[8,128]{1,0} all-reduce(%x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%condition
  %fusion.1 = f32[5,8,64]{2,1,0} fusion(%reduced, %ys, %i), kind=kOutput, calls=%fused
  ROOT %tuple.1 = (s32[], bf16[8,128]{1,0}, f32[5,8,64]{2,1,0}) tuple(%next, %reduced, %fusion.1)
}

ENTRY %main (x: bf16[8,128], ys: f32[5,8,64]) -> f32[5,8,64] {
  %x.1 = bf16[8,128]{1,0} parameter(0)
  %ys.1 = f32[5,8,64]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %tuple.2 = (s32[], bf16[8,128]{1,0}, /*index=2*/f32[5,8,64]{2,1,0}) tuple(%start, %x.1, %ys.1)
  %while.1 = (s32[], bf16[8,128]{1,0}, f32[5,8,64]{2,1,0}) while(%tuple.2), condition=%condition, body=%body
  %on_chip = bf16[8,128]{1,0:T(8,128)S(1)} copy(%x.1)
  ROOT %result = f32[5,8,64]{2,1,0} get-tuple-element(%while.1), index=2
}
"""


def test_a_loop_counts_by_its_trips() -> None:
    program = hlo.parse(LOOP)
    assert hlo.flops(program) == 5 * 2 * 8 * 64 * 128
    read, written = 8 * 128 * 2 + 4, 8 * 64 * 4  # what is updated in place is not read, and only the slice is written
    by_name = {each.name: times * hlo.memory_bytes(program, at, each) for at, each, times in program.executed()}
    assert by_name["fusion.1"] == 5 * (read + written)
    assert by_name["on_chip"] == 8 * 128 * 2  # read from main memory, written to the chip's own
    assert by_name["while.1"] == by_name["reduced"] == 0


def test_a_counter_may_take_longer_steps() -> None:
    program = hlo.parse(LOOP.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)"))
    assert hlo.flops(program) == 3 * 2 * 8 * 64 * 128


def test_a_known_trip_count_is_believed() -> None:
    known = 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    assert hlo.flops(hlo.parse(LOOP.replace("body=%body", known))) == 7 * 2 * 8 * 64 * 128


def test_collectives_count_what_each_device_sends() -> None:
    (found,) = hlo.collectives(hlo.parse(LOOP), 8)
    assert found == hlo.Collective("all-reduce", (0, 2, 4, 6), 2 * (8 * 128 * 2) * 3 / 4, 5.0)
    assert hlo.mesh_axes(found.group, {"replica": 1, "data": 4, "expert": 1, "model": 2}) == ("data",)
    assert hlo.mesh_axes(found.group, {"replica": 2, "data": 2, "expert": 1, "model": 2}) == ("replica", "data")


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups={{0,3},{1,2}}", (0, 3)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_groups_are_read_in_all_their_forms(groups: str, first: tuple[int, ...]) -> None:
    (found,) = hlo.collectives(hlo.parse(LOOP.replace("replica_groups=[2,4]<=[4,2]T(1,0)", groups)), 8)
    assert found.group == first


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("bf16[32,128]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}", 2048 * 3),
        ("bf16[2,128]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}", 2048 * 3 / 4),
        ("bf16[8,128]{1,0} all-to-all(%x), replica_groups=[2,4]<=[8], dimensions={0}", 2048 * 3 / 4),
        ("bf16[8,128]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", 2048),
    ],
)
def test_each_kind_sends_what_a_ring_does(line: str, sent: float) -> None:
    old = "bf16[8,128]{1,0} all-reduce(%x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%condition"
    (found,) = hlo.collectives(hlo.parse(LOOP.replace(old, line)), 8)
    assert (found.sent, found.times) == (sent, 5)


CHAIN = """\
HloModule jit_f, is_scheduled=true

%part (x: bf16[2,128]) -> bf16[8,128] {
  %x = bf16[2,128]{1,0} parameter(0)
  ROOT %all-gather.9 = bf16[8,128]{1,0} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}
}

ENTRY %main (x: bf16[2,128]) -> bf16[8,128] {
  %x.1 = bf16[2,128]{1,0} parameter(0)
  %async-collective-start.3 = bf16[8,128]{1,0} fusion(%x.1), kind=kCustom, calls=%part
  %fusion.1 = bf16[8,128]{1,0} fusion(%x.1), kind=kOutput, calls=%part
  ROOT %async-collective-done.3 = bf16[8,128]{1,0} fusion(%x.1), kind=kCustom, calls=%part
}
"""  # noqa: E501


def test_what_a_tpu_spreads_over_a_chain_of_fusions_is_sent_once() -> None:
    (found,) = hlo.collectives(hlo.parse(CHAIN), 8)
    assert (found.kind, found.sent, found.times) == ("all-gather", 3 * 2 * 128 * 2, 1)


OFFLOADED = """\
HloModule jit_f, is_scheduled=true

%kernel (x: bf16[2,128]) -> bf16[8,128] {
  %x = bf16[2,128]{1,0} parameter(0)
  ROOT %all-gather.9 = bf16[8,128]{1,0} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}, execution_thread="sparsecore"

%wrapped (x: bf16[2,128]) -> bf16[8,128] {
  %x.1 = bf16[2,128]{1,0} parameter(0)
  ROOT %custom-call.1 = bf16[8,128]{1,0} custom-call(%x.1), custom_call_target="any", called_computations={%kernel}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[2,128]) -> bf16[8,128] {
  %x.2 = bf16[2,128]{1,0} parameter(0)
  %start = ((bf16[2,128]{1,0}), bf16[8,128]{1,0}, u32[]{:S(8)}) async-start(%x.2), calls=%wrapped
  ROOT %done = bf16[8,128]{1,0} async-done(%start)
}
"""


BETWEEN_SLICES = """\
HloModule jit_f, is_scheduled=true

ENTRY %main (x: f32[64,128]) -> f32[64,128] {
  %x.1 = f32[64,128]{1,0} parameter(0)
  %after-all.1 = token[] after-all()
  %recv.1 = (f32[64,128]{1,0}, u32[]{:S(2)}, token[]) recv(%after-all.1), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="SLICES",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.1 = (f32[64,128]{1,0}, u32[]{:S(2)}, token[]) send(%x.1, %after-all.1), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_target="SLICES",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.1 = token[] send-done(%send.1), channel_id=1, is_host_transfer=true
  %recv-done.1 = (f32[64,128]{1,0}, token[]) recv-done(%recv.1), channel_id=2, is_host_transfer=true
  ROOT %y = f32[64,128]{1,0} get-tuple-element(%recv-done.1), index=0
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("slices", "group", "share"), [("{1,2}x{0:3}", (0, 4), 1 / 2), ("{1:4}x{0:1}", (0, 2, 4, 6), 3 / 4)]
)
def test_what_slices_send_each_other_is_seen(slices: str, group: tuple[int, ...], share: float) -> None:
    program = hlo.parse(BETWEEN_SLICES.replace("SLICES", slices))
    (found,) = hlo.collectives(program, 8)
    assert (found.kind, found.group, found.sent) == ("all-reduce", group, 2 * share * 64 * 128 * 4)
    assert sum(hlo.memory_bytes(program, place, each) for place, each, _ in program.executed()) == 0


def test_what_another_core_sends_meanwhile_is_seen() -> None:
    """As a TPU7x has its SparseCores do it."""
    program = hlo.parse(OFFLOADED)
    (found,) = hlo.collectives(program, 8)
    assert (found.kind, found.sent, found.times) == ("all-gather", 3 * 2 * 128 * 2, 1)
    assert sum(hlo.memory_bytes(program, place, each) for place, each, _ in program.executed()) == 0


def test_a_batched_product_as_a_tpu_writes_it() -> None:
    """[6 heads, 16, 32] x [6, 32, 24]: heads are spatial, and only where window and head meet there is an entry."""
    text = LOOP.replace(
        "%convolution.1 = f32[8,64]{1,0} convolution(%param_0, %weights), dim_labels=bf_io->bf",
        "%left = bf16[6,16,32]{2,1,0} constant({...})\n  %right = bf16[6,32,24]{2,1,0} constant({...})\n"
        "  %convolution.1 = f32[6,16,24]{2,1,0} convolution(%left, %right), "
        "window={size=6 stride=5 pad=0_0 lhs_dilate=6}, dim_labels=0bf_0io->0bf",
    )
    assert hlo.flops(hlo.parse(text)) == 5 * 2 * 6 * 16 * 24 * 32


def test_flops_of_what_is_compiled_here() -> None:
    def f(x: jax.Array, ws: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0].sum()

    x, ws = jnp.ones((16, 32)), jnp.ones((7, 32, 32))
    text = jax.jit(jax.grad(f, argnums=1)).lower(x, ws).compile().as_text()
    # Forward, and two products backward, of which the first layer needs one; XLA's own analysis counts one layer.
    assert hlo.flops(hlo.parse(text)) == 7 * 3 * 2 * 16 * 32 * 32
