"""Tests how preflight reads a compiled program, and its arithmetic, on programs and figures written by hand."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from fastvlm_jax.config import get_base
from fastvlm_jax.preflight import describe, estimate, fit, topology
from fastvlm_jax.preflight.compile import needed
from fastvlm_jax.preflight.hlo import cost, flops, network, parse
from fastvlm_jax.preflight.hlo.cost import Collective, Operation, Program

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
LOOP = f"""HloModule step

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {{
  %state = (s32[]{{:T(128)}}, f32[8,4]{{1,0:T(8,128)}}) parameter(0)
  %x = f32[8,4]{{1,0:T(8,128)}} get-tuple-element(%state), index=1
  %work = f32[8,4]{{1,0:T(8,128)}} fusion(%x), kind=kLoop, calls=%fused, {CYCLES % 100}
  ROOT %next = (s32[], f32[8,4]) tuple(%state, %work)
}}

%condition (state.1: (s32[], f32[8,4])) -> pred[] {{
  %state.1 = (s32[], f32[8,4]) parameter(0)
  %limit = s32[]{{:T(128)}} constant(5)
  %i = s32[]{{:T(128)}} get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}

%fused (p: f32[8,4]) -> f32[8,4] {{
  %p = f32[8,4]{{1,0:T(8,128)}} parameter(0)
  ROOT %twice = f32[8,4]{{1,0:T(8,128)}} add(%p, %p)
}}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {{
  %a = f32[8,4]{{1,0:T(8,128)}} parameter(0)
  %start = s32[] constant(START)
  %first = s32[]{{:T(128)}} copy(%start)
  %initial = (s32[], f32[8,4]) tuple(%first, %a)
  %loop = (s32[], f32[8,4]) while(%initial), condition=%condition, body=%body, metadata={{op_name="jit(f)/while"}}
  %out = f32[8,4]{{1,0:T(8,128)}} get-tuple-element(%loop), index=1
  ROOT %last = f32[8,4]{{1,0:T(8,128)}} fusion(%out), kind=kLoop, calls=%fused, {CYCLES % 7}
}}
"""


def cycles(found: Program) -> int:
    return sum((o.cycles or 0) * o.trips for o in found.operations)


@pytest.mark.parametrize("start, total", [(0, 507), (1, 407)])
def test_a_loop_counts_as_often_as_it_runs(start, total):
    found = cost.analyse(parse.parse(LOOP.replace("START", str(start))), 1)
    assert cycles(found) == total
    assert not found.unknown


def test_a_loop_that_depends_on_data_is_a_program_of_its_own():
    text = LOOP.replace("START", "0").replace("  %limit = s32[]{:T(128)} constant(5)\n", "")
    found = cost.analyse(parse.parse(text.replace("(%i, %limit)", "(%i, %i)")), 1)
    assert cycles(found) == 7
    assert [cycles(loop) for loop in found.unknown] == [100]


def test_metadata_over_several_lines_does_not_end_a_computation():
    text = LOOP.replace("START", "0").replace(
        "calls=%fused, " + CYCLES % 100,
        'calls=%fused, frontend_attributes={kernel_metadata={\n"a":1\n}}, ' + CYCLES % 100,
    )
    assert cycles(cost.analyse(parse.parse(text), 1)) == 507


def test_bytes_of_shapes_without_padding_or_on_chip_memory():
    shape = "(bf16[2,3]{1,0:T(8,128)(2,1)}, f32[5]{0:T(128)S(1)}, s32[], pred[4]{0})"
    assert parse.num_bytes(shape) == 12 + 20 + 4 + 4
    assert parse.num_bytes(shape, hbm_only=True) == 12 + 4 + 4


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("holes", [1, 2])
@pytest.mark.parametrize("spread", [1, 3])
@pytest.mark.parametrize("low, high", [(0, 0), (3, 2), (-1, 1)])
def test_flops_of_a_convolution_leave_out_padding_and_holes(stride, holes, spread, low, high):
    """Compares with a convolution of ones, whose sum is the number of its multiply-adds."""
    x, kernel = jnp.ones((2, 13, 1, 6)), jnp.ones((3, 1, 2, 12))
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, 1), ((low, high), (0, 0)), (holes, 1), (spread, 1), ("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )  # fmt: skip
    window = f"size=3x1 stride={stride}x1 pad={low}_{high}x0_0 lhs_dilate={holes}x1 rhs_dilate={spread}x1"
    text = f"""ENTRY %main (x: f32[2,13,1,6]) -> f32[] {{
  %x = f32[2,13,1,6]{{3,2,1,0}} parameter(0)
  %k = f32[3,1,2,12]{{3,2,1,0}} parameter(1)
  ROOT %y = f32[{",".join(map(str, y.shape))}]{{3,2,1,0}} convolution(%x, %k), window={{{window}}}, \
dim_labels=b01f_01io->b01f, feature_group_count=3
}}
"""
    module = parse.parse(text)
    assert flops.flops(module, module.computations["main"]) == 2 * float(y.sum())


def test_flops_of_a_matrix_product_in_a_fusion():
    text = """%fused (a: bf16[64,32], b: bf16[16,32]) -> f32[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  ROOT %y = f32[64,16]{1,0} convolution(%a, %b), dim_labels=bf_oi->bf
}

ENTRY %main (x: bf16[64,32], w: bf16[16,32]) -> f32[64,16] {
  %x = bf16[64,32]{1,0} parameter(0)
  %w = bf16[16,32]{1,0} parameter(1)
  ROOT %out = f32[64,16]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused
}
"""
    module = parse.parse(text)
    main = module.computations["main"]
    assert flops.instruction_flops(module, main, main.root) == 2 * 64 * 32 * 16
    assert flops.traffic(module, main, main.root) == 2 * (64 * 32 + 16 * 32) + 4 * 64 * 16


@pytest.mark.parametrize("batch, examples", [("", 1), ("2,", 2)])
@pytest.mark.parametrize("kind, products", [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_attention_kernels_count_their_products(batch, examples, kind, products):
    text = f"""ENTRY %main (x: s32[1]) -> f32[8,64,32] {{
  %order = s8[1,1,1]{{2,1,0}} parameter(0)
  %q = bf16[{batch}8,64,32]{{2,1,0}} parameter(1)
  %k = bf16[{batch}4,128,32]{{2,1,0}} parameter(2)
  ROOT %splash_mha_{kind}.1 = f32[{batch}8,64,32]{{2,1,0}} custom-call(%order, %q, %k, %k), \
custom_call_target="tpu_custom_call"
}}
"""
    (kernel,) = [o for o in cost.analyse(parse.parse(text), 1).operations if o.kernel]
    assert kernel.kernel_flops == 2 * products * examples * 8 * 64 * 128 * 32


def test_of_a_stack_that_a_loop_slices_the_slice_is_read():
    text = """%fused (stack: f32[24,100], i: s32[]) -> f32[100] {
  %stack = f32[24,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,100]{1,0} dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,100}
  ROOT %out = f32[100]{0} bitcast(%row)
}

ENTRY %main (x: f32[24,100], n: s32[]) -> f32[100] {
  %x = f32[24,100]{1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %y = f32[100]{0} fusion(%x, %n), kind=kLoop, calls=%fused
}
"""
    module = parse.parse(text)
    main = module.computations["main"]
    assert flops.traffic(module, main, main.root) == 400 + 4 + 400


def test_weights_that_are_fetched_beside_the_computation_take_their_time():
    """A v5e chip has 819 GB/s: a slice of 8 MB and a copy of 2 MB beside products, then 30,000 cycles."""
    text = """%slice (w: bf16[4000,2000]) -> bf16[2000,2000] {
  %w = bf16[4000,2000]{1,0} parameter(0)
  ROOT %part = bf16[2000,2000]{1,0:S(1)} slice(%w), slice={[0:2000], [0:2000]}
}

%fused (x: bf16[2000,2000]) -> f32[2000] {
  %x = bf16[2000,2000]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %sum = f32[2000]{0} reduce(%x, %zero), dimensions={1}, to_apply=%add
}

ENTRY %main (w: bf16[4000,2000], v: bf16[1000,1000]) -> f32[2000] {
  %w = bf16[4000,2000]{1,0} parameter(0)
  %v = bf16[1000,1000]{1,0} parameter(1)
  %slice-start.3 = ((bf16[4000,2000]{1,0}), bf16[2000,2000]{1,0:S(1)}, s32[]{:S(2)}) async-start(%w), calls=%slice
  %copy-start = (bf16[1000,1000]{1,0:S(1)}, bf16[1000,1000]{1,0}, u32[]{:S(2)}) copy-start(%v)
  %slice-done.3 = bf16[2000,2000]{1,0:S(1)} async-done(%slice-start.3)
  %near = f32[2000]{0:S(1)} fusion(%slice-done.3), kind=kLoop, calls=%fused, \
backend_config={"estimated_cycles":"6000"}
  ROOT %far = f32[2000]{0} fusion(%w), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"30000"}
}
"""
    found = cost.analyse(parse.parse(text), 1)
    chip = topology.parse("v5e:1x1")
    clock = 197e12 / (4 * 128 * 128 * 2)  # four matrix units
    assert estimate.fetching_s(found, chip) == pytest.approx(10e6 / 819e9 + 30_000 / clock)
    assert estimate.timing(found, chip, [])["compute_s"] == pytest.approx(36_000 / clock)


@pytest.mark.parametrize(
    "written, group",
    [
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}", range(8)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0'}", (0, 8)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1':(2)2}", (0, 2)),
        ("replica_groups={{0,4},{1,5}}", (0, 4)),
        ("replica_groups=[4,4]<=[16]", range(4)),
        ("replica_groups=[2,8]<=[8,2]T(1,0)", range(0, 16, 2)),
        ("replica_groups={}", range(16)),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=2], device_ids=([2,8]T(1,0)) {'axis_2'}", (0, 8)),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2], device_ids=([16]) {'axis_0'}", range(0, 16, 2)),
    ],
)
def test_devices_of_a_group_in_every_way_that_it_is_written(written, group):
    text = f"""ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %y = f32[4]{{0}} all-reduce(%x), channel_id=1, {written}, use_global_device_ids=true, to_apply=%add
}}
"""
    (found,) = cost.analyse(parse.parse(text), 16).collectives
    assert found.group == tuple(group)
    assert (found.kind, found.payload, found.asynchronous) == ("all-reduce", 16, False)


def test_a_group_written_in_another_way_is_refused():
    with pytest.raises(ValueError, match="preflight cannot read replica_groups=new"):
        cost._group("channel_id=1, replica_groups=new[4], to_apply=%add", 16)


def test_axes_of_a_group():
    mesh = {"replica": 1, "data": 2, "fsdp": 4, "tensor": 2}
    assert cost.axes_of((0, 2, 4, 6), mesh) == ("fsdp",)
    assert cost.axes_of((0, 1, 8, 9), mesh) == ("data", "tensor")


FUSED = """%start (p: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %g = bf16[16,8]{1,0} all-gather(%p), channel_id=14, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %s = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%step (q: bf16[4,8]) -> bf16[16,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  ROOT %g.1 = bf16[16,8]{1,0} all-gather(%q), channel_id=14, replica_groups={{0,1,2,3}}, dimensions={0}
}

%all-reduce-scatter.1 (r: f32[16,8]) -> f32[4,8] {
  %r = f32[16,8]{1,0} parameter(0)
  %a = f32[16,8]{1,0} all-reduce(%r), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %d = f32[4,8]{1,0} dynamic-slice(%a, %r), dynamic_slice_sizes={4,8}
}

ENTRY %main (x: bf16[4,8], y: f32[16,8]) -> f32[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = f32[16,8]{1,0} parameter(1)
  %begin = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %middle = bf16[16,8]{1,0} fusion(%x), kind=kOutput, calls=%step
  %end = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%step
  %tied = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%end), channel_id=5, replica_groups={{0,1,2,3}}
  %far = (f32[7]{0}, u32[], token[]) send(%y, %y), channel_id=9, is_host_transfer=true, \
frontend_attributes={_xla_megascale_reduce_operation="SUM"}
  ROOT %out = f32[4,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_fused_and_started_transfers_are_found_and_counted_once():
    found = cost.analyse(parse.parse(FUSED), 4).collectives
    assert [(c.kind, c.payload, len(c.group), c.asynchronous) for c in found] == [
        ("all-gather", 256, 4, True),
        ("all-gather", 1024, 4, True),
        ("all-reduce", 28, 0, True),
        ("reduce-scatter", 512, 4, False),
    ]


def devices(*shape):
    """Returns the devices of a slice in the order of their coordinates, the last axis fastest."""
    ranges = [range(size) for size in shape]
    places = [(a, b) for a in ranges[0] for b in ranges[1]]
    return [SimpleNamespace(coords=(*place, 0)) for place in places]


def gather(group, payload=1e9, kind="all-gather"):
    return Collective(kind, payload, 1, tuple(group), False, "", "main")


@pytest.mark.parametrize(
    "name, kind, group, expected",
    [
        ("v5e:4x4", "all-gather", range(4), 0.75 / 50 + 3e-6),  # a line of 4: one link in each direction of flow
        ("v5e:4x4", "all-reduce", range(4), 1.5 / 50 + 6e-6),
        ("v5e:16x16", "all-gather", range(16), 15 / 16 / 100 + 7e-6),  # a ring: both directions
        ("v5e:4x4", "all-gather", range(16), 15 / 16 / 100 + 6e-6),  # two lines at a time
        ("v5e:4x4", "all-gather", (0, 2), 0.5 / 25 + 2e-6),  # the link between them is shared with 1 and 3
        ("v5e:4x4", "collective-permute", (0, 1), 1 / 50 + 1e-6),
        ("v5e:4x4", "all-gather", (0,), 0.0),
    ],
)
def test_seconds_of_a_transfer_between_chips(name, kind, group, expected):
    slices = topology.parse(name)
    assert network.seconds(gather(group, kind=kind), slices, devices(*slices.shape)) == pytest.approx(expected)


def test_seconds_of_a_transfer_between_slices():
    slices = topology.parse("v5e:16x16*2")
    between = Collective("all-reduce", 3.125e9, 1, (), True, "", "main")
    assert network.seconds(between, slices, []) == pytest.approx(1.0)


def test_scheduled_hidden_and_serial_time():
    slices = topology.parse("v5e:4x4")

    def work(seconds, loop):
        return Operation("", "fusion", round(seconds * slices.generation.clock), 1, 0.0, 0.0, loop)

    def transfer(seconds, loop, asynchronous):  # between four chips in a line
        return Collective("all-gather", (seconds - 3e-6) * 50e9 / 0.75, 1, (0, 1, 2, 3), asynchronous, "", loop)

    found = Program(
        [work(0.5, "a"), work(0.1, "b")],
        [transfer(0.2, "a", True), transfer(0.1, "a", False), transfer(0.4, "b", True)],
        [],
    )
    times = estimate.timing(found, slices, devices(4, 4))
    assert times["compute_s"] == pytest.approx(0.6)
    assert times["serial_s"] == pytest.approx(1.3)
    assert times["scheduled_s"] == pytest.approx(0.5 + 0.1 + 0.1 + 0.3)
    assert times["hidden_s"] == pytest.approx(0.5 + 0.4)
    assert estimate.binding(times) == "ICI"


def test_transfers_between_slices_are_hidden_too_or_bind():
    slices = topology.parse("v5e:16x16*2")
    between = Collective("all-reduce", 3.125e9, 2, (), True, "", "main")
    work = Operation("", "fusion", round(0.5 * slices.generation.clock), 1, 0.0, 0.0, "main")
    times = estimate.timing(Program([work], [between], []), slices, [])
    assert times["hidden_s"] == times["scheduled_s"] == pytest.approx(2.0)
    assert (times["serial_s"], estimate.binding(times)) == (pytest.approx(2.5), "DCN")


def test_published_figures_of_chips():
    v5e, v7x = topology.parse("v5e:4x8"), topology.parse("tpu7x:2x2x2")
    assert (v5e.chips, v5e.num_devices, v7x.chips, v7x.num_devices) == (32, 32, 8, 16)
    assert v5e.generation.clock == pytest.approx(1.5e9, rel=0.01)
    assert topology.parse("v4:4x4x4").generation.clock == pytest.approx(1.05e9, rel=0.01)
    assert topology.parse("v5e:16x16*2").chips == 512


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5e", "write GENERATION:SHAPE, as v5e:4x4"),
        ("v5e:3x3", "v5e has no such slice: choose 1x1, 2x2"),
        ("v5p:4x4", "v5p has no such slice: choose 2x2x1"),
        ("v5p:4x4x6", "or multiples of 4x4x4 up to 6144 chips"),
        ("v6e:32x32", "v6e has no such slice"),
        ("v4:16x16x20", "v4 has no such slice"),
        ("v9:2x2", "unknown TPU 'v9': choose one of v4, v5e, v5p, v6e, v7x"),
        ("v5e:4x4*0", "v5e has no such slice"),
    ],
)
def test_a_topology_that_does_not_exist_is_refused(name, message):
    with pytest.raises(ValueError, match="--topology=") as error:
        topology.parse(name)
    assert message in str(error.value)


def test_groups_that_a_mesh_divides():
    config = get_base("0.5b")
    config.data.groups, config.data.images_per_group, config.data.row_length = 32, 4, 2048  # 256 + 256 a sample
    assert fit.regrouped(config, 16) == {"groups": 32, "images_per_group": 4, "row_length": 2048}
    assert fit.regrouped(config, 64) == {"groups": 64, "images_per_group": 2, "row_length": 1024}
    assert fit.regrouped(config, 128) == {"groups": 128, "images_per_group": 1, "row_length": 512}
    assert fit.regrouped(config, 256) == {}


def test_hours_need_records_and_know_the_papers():
    config = get_base("0.5b")
    config.data.mixture = (("data/recap_cc3m", 0.0), ("recap_cc12m", 0.0))
    assert estimate.records_of(config, None) == 15_000_000
    assert estimate.records_of(config, 1000) == 1000
    config.data.mixture = (("mine", 0.0),)
    assert estimate.records_of(config, None) is None


def test_parts_of_the_model_by_the_names_of_operations():
    step = "jit(train_step)/transpose(jvp(FastVLM))/"
    names = {
        step + "FastVLM.encode/vision/stem_0/dot": "vision",
        step + "FastVLM.encode/projector/fc1/dot": "projector",
        step + "FastVLM.decode/llm/while/body/closed_call/layers/q/dot": "llm",
        step + "FastVLM.decode/llm/shard_map/while/body/nd,cd->nc/dot": "loss",
        "jit(train_step)/jvp(CLIP)/CLIP.embed_images/vision/stage_1/ffn/fc1/dot_general": "vision",
        "jit(train_step)/transpose(jvp(CLIP))/CLIP.embed_texts/text/layers/fc2/dot_general": "text",
        "jit(train_step)/jvp(CLIP)/CLIP.embed_images/div": "other",
        "jit(train_step)/transpose(jvp(loss_of_pairs))/rc,cd->rd/dot_general": "loss",
        "jit(train_step)/seldom/cond/branch_1_fun/rd,cd->rc/dot_general": "other",
        "jit(train_step)/mul": "optimizer",
        "": "other",
    }
    assert {name: estimate.part_of(name) for name in names} == names


def test_what_the_compiler_says_that_a_program_needs():
    message = (
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (20.50G) exceeds available HBM (15.75G)."
    )
    assert needed(message) == 20.5 * 2**30
    assert needed("Ran out of memory in memory space hbm. Used 17.00G of 15.75G hbm.") == 17 * 2**30


def test_costs_are_named_by_pass_and_layer():
    block = "while/body/closed_call/stage_1.<lambda>/stage_1.<lambda>/checkpoint/"
    for path, name in {
        f"jit(train_step)/transpose(jvp(FastVLM))/FastVLM.encode/vision/{block}stage_1/ffn/conv/cond/branch_0_fun/"
        "transpose(jvp())/conv_general_dilated": "backward vision/stage_1/ffn/conv/conv_general_dilated",
        f"jit(encoder_step)/transpose(jvp(FastVLM.encode))/vision/{block}rematted_computation/stage_1/ffn/fc1/"
        "dot_general": "recomputed vision/stage_1/ffn/fc1/dot_general",
        "jit(train_step)/jvp(FastVLM)/FastVLM.decode/llm/shard_map/while/body/closed_call/nd,cd->nc/dot_general":
            "forward llm/nd,cd->nc/dot_general",
        "jit(train_step)/jvp(FastVLM)/FastVLM.encode/vision/while": "forward vision/while",
        "jit(train_step)/mul": "mul",
        "copy": "copy",
    }.items():  # fmt: skip
        assert describe.short(path) == name
    assert describe.short("a/b/" * 30 + "end", 20) == "..." + "/b/a/b/a/b/a/b/end"[-17:]


def test_numbers_are_short():
    assert [describe.si(x) for x in (1_234_567, 1.5e12, 12)] == ["1.23M", "1.5T", "12"]
    assert math.isclose(float(describe.gib(2**30)), 1.0)


def test_flops_are_written_with_a_space_before_the_unit():
    assert (
        describe.flop(13.7e12) == "13.7 TFLOP"
        and describe.flop(2.5e9) == "2.5 GFLOP"
        and describe.flop(12) == "12 FLOP"
    )
