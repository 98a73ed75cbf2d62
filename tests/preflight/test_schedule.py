"""Tests how kernels are counted: schedules and modules written by hand, and real kernels compiled for a v5e chip."""

import importlib.util
import json
import math
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fastvlm_jax import sharding
from fastvlm_jax.kernels import depthwise_tpu
from fastvlm_jax.kernels.splash import splash_attention
from fastvlm_jax.preflight import compile_kernels, describe, estimate, kernels, schedules, topology
from fastvlm_jax.preflight.compile import cache_folder, compile
from fastvlm_jax.preflight.hlo import cost, mosaic, parse, schedule
from fastvlm_jax.preflight.hlo.cost import Operation, Program
from fastvlm_jax.preflight.hlo.schedule import Schedule

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler (libtpu)")
CHIP = topology.parse("v5e:1x1")

# 3 bundles outside; a grid of 6 steps with 7 bundles of its own; a loop of 10 turns with 5, two of them delay slots.
NESTED = """= control target key start
LB: loop body
     0   :  { %s62_s1 = smov.u32 0  ;;  %s9_s2 = smov.u32 0 /* copy */ } /* Start region 7 */
   0x1 LB: > { %s8_s3 = sphi %s9_s2, %s14_s4 /* phi copy :: iteration index, stage = 1 */ } /* Start region 120 */
   0x2   : > { %s30_s9 = smov.u32 3 /* BoundsCheck 56 [deref of opnd#2]
hlo: kernel.1
base_bounds: (48, 4) */ }
   0x3   : > { %5 = sbr.rel (%p77_p3) target = $region58 }
   0x4 LB: >> { %s22_s5 = sphi %s30_s9, %s20_s6  ;;  %s20_s6 = sadd.s32 1, %s22_s5 } /* Start region 109 */
   0x5   : >> { %p2_p1 = scmp.ge.s32.totalorder %s20_s6, 13 /* loop exit test */ }
   0x6   : >> { %219 = sbr.rel (!%p2_p1) target = $region109  ;;  %v3 = vmatmul.msk.bf16.gmra.mxu1 %v2 }
   0x7   :  {}
   0x8   :  {} /* End region 109 */
   0x9 PF: > { %s14_s4 = sadd.s32 1, %s8_s3  ;;  %v4 = vmatmul.f32.gmra.mxu1 %v3  ;;  %v5 = vmatmul.f32.gmra.mxu0 %v3 }
   0xa   : > { %p0_p2 = scmp.ge.s32.totalorder %s14_s4, 8 /* loop exit test */ }
   0xb   :  { %13 = sbr.rel (!%p0_p2) target = $region120 }
   0xc   :  {}
   0xd   :  { %300 = vsyncpa [#allocation5], 1 }
   0xe   :  { %301 = vsyncpa [#allocation5], 2 }
"""


def test_loops_count_as_often_as_they_run():
    # A turn of the inner loop: 16 rows in unit 1; of the grid, 8 rows in units 0 and 1.
    assert schedule.count(NESTED) == Schedule(3 + 6 * (7 + 10 * 5), 6 * (8 + 10 * 16), 0)


def test_a_loop_that_is_no_grid_has_no_turns_for_the_first_and_last_block():
    text = NESTED.replace("iteration index, stage = 1", "a counter")
    assert schedule.count(text).bundles == 3 + 8 * (7 + 10 * 5)


def test_a_grid_has_as_many_turns_more_as_its_last_stage_says():
    """A fusion of XLA fetches blocks several turns ahead."""
    text = NESTED.replace(
        "stage = 1 */", "stage = 1 */  ;;  %s4_s8 = sadd.s32 -5, %s8_s3 /* iteration index, stage = 5 */"
    )
    assert schedule.count(text).bundles == 3 + 3 * (7 + 10 * 5)


def test_a_step_of_a_counter_and_a_limit_that_it_passes():
    text = NESTED.replace("%s20_s6 = sadd.s32 1,", "%s20_s6 = sadd.s32 3,")  # 3, 6, 9, 12
    assert schedule.count(text).bundles == 3 + 6 * (7 + 4 * 5)


def test_two_loops_one_after_the_other():
    inner = NESTED[NESTED.index("   0x4 LB") : NESTED.index("   0x9 PF")]
    again = inner.replace("p2_p1", "p3_p1").replace("s20_", "s21_").replace("s22_", "s23_").replace("109", "110")
    text = NESTED.replace("   0x9 PF", again.replace(", 13 /*", ", 5 /*") + "   0x9 PF")
    assert schedule.count(text).bundles == 3 + 6 * (7 + 10 * 5 + 2 * 5)


def test_a_loop_of_unknown_trips_counts_once_and_is_told():
    text = NESTED.replace("%s20_s6, 13 /*", "%s20_s6, %s31_s7 /*")
    assert schedule.count(text) == Schedule(3 + 6 * (7 + 5), 6 * (8 + 16), 1)


def test_rows_by_type_in_the_busiest_unit():
    kinds = ["bf16.gmra.mxu0", "mubr.bf16.gmra.mxu3", "s8.gmra.mxu3", "f32.gmra.mxu2", "f8e5m2.gmra.mxu1", "msrb.mxu1"]
    text = "   0x1   :  { " + "  ;;  ".join(f"%v{i} = vmatmul.{kind} %v9" for i, kind in enumerate(kinds)) + " }\n"
    assert schedule.count(text) == Schedule(1, 16 + 32, 0)


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="has no bundles: preflight may not know this version of libtpu"):
        schedule.count("Schedule analysis:\n\ttotal scheduled bundles: 95\n")


MODULE = """module attributes {stable_mosaic.version = 15 : i64} {
  "stable_mosaic.func.func"() ({
  ^bb0(%arg0: i32, %arg1: i32, %arg2: i32, %arg3: memref<1xi32, #tpu.memory_space<smem>>, \
%arg4: memref<16x128xbf16, #tpu.memory_space<vmem>>, %arg5: memref<8x128xf32, #tpu.memory_space<vmem>>, \
%arg6: memref<9x4x4xf32, #tpu.memory_space<any>>, %arg7: memref<16x128xi8, #tpu.memory_space<vmem>>):
  }) {iteration_bounds = array<i64: 2, 3, 5>, scalar_prefetch = 1 : i64, \
window_params = [{transform_indices = @transform_0, window_bounds = array<i64: 16, 128>}, \
{transform_indices = @transform_1, window_bounds = array<i64: 8, 128>}, {}, \
{transform_indices = @transform_3, window_bounds = array<i64: 16, 128>}]} : () -> ()
  "stable_mosaic.func.func"() ({
  ^bb0(%arg0: i32, %arg1: i32, %arg2: i32, %arg3: memref<1xi32, #tpu.memory_space<smem>>):
    %0 = "stable_mosaic.arith.addi"(%arg1, %arg1) : (i32, i32) -> i32
    "stable_mosaic.func.return"(%0, %arg0) : (i32, i32) -> ()
  }) {sym_name = "transform_0"} : () -> ()
  "stable_mosaic.func.func"() ({
  ^bb0(%arg0: i32, %arg1: i32, %arg2: i32, %arg3: memref<1xi32, #tpu.memory_space<smem>>):
    %0 = "stable_mosaic.memref.load"(%arg3) : (memref<1xi32>) -> i32
    "stable_mosaic.func.return"(%0, %0) : (i32, i32) -> ()
  }) {sym_name = "transform_1"} : () -> ()
  "stable_mosaic.func.func"() ({
  ^bb0(%arg0: i32, %arg1: i32, %arg2: i32, %arg3: memref<1xi32, #tpu.memory_space<smem>>):
    "stable_mosaic.func.return"(%arg2, %arg2) : (i32, i32) -> ()
  }) {sym_name = "transform_3"} : () -> ()
}
"""


def test_blocks_move_with_the_axes_that_their_place_depends_on():
    moved = [6 * 16 * 128 * 2, 8 * 128 * 4, 30 * 16 * 128]  # the second stays, the third array has no blocks
    assert mosaic._bytes(MODULE, set()) == sum(moved)
    assert mosaic._bytes(MODULE, {1}) == sum(moved[1:])  # operand 0 is the prefetched scalar
    still = MODULE.replace("2, 3, 5>", "2, 3, 1>")  # an axis of one step
    assert mosaic._bytes(still, set()) == 6 * 16 * 128 * 2 + 8 * 128 * 4 + 16 * 128


def test_without_a_module_the_blocks_are_unknown():
    assert mosaic.block_bytes("backend_config={}", set()) is None
    assert mosaic.block_bytes('"body":"AAAA"', set()) is None  # an empty module
    assert mosaic.block_bytes('"body":"bm8gbW9kdWxl"', set()) is None  # "no module"


def kernel(counted, traffic=0.0, flops=0.0, trips=1):
    return Operation("llm", "custom-call", None, trips, 0.0, traffic, "main", "kernel", flops, counted)


@pytest.mark.parametrize(
    "name, counted, traffic, cycles, bound",
    [
        ("v5e:1x1", Schedule(900, 800, 0), 819 * 500, 900, "bundles"),
        ("v5e:1x1", Schedule(900, 1600, 0), 819 * 500, 1600, "matrix units"),
        ("v6e:1x1", Schedule(900, 1600, 0), 0, 900, "bundles"),  # its units take two rows a cycle
        ("v6e:1x1", Schedule(900, 2000, 0), 0, 1000, "matrix units"),
        ("v5e:1x1", Schedule(900, 1600, 0), 819e9 / (197e12 / 131_072) * 1700, 1700, "HBM"),
        ("v5e:1x1", None, 0, 700, kernels.PEAK),
    ],
)
def test_a_kernel_takes_the_longest_of_bundles_matrix_units_and_hbm(name, counted, traffic, cycles, bound):
    slices = topology.parse(name)
    found = kernel(counted, traffic, 700 * slices.generation.flops_per_cycle, trips=3)
    assert kernels.cycles(found, slices) == (pytest.approx(cycles), bound)
    assert estimate.cycles_of(found, slices) == pytest.approx(3 * cycles)


def test_kernels_are_listed_with_what_bounds_them():
    found = Program([kernel(Schedule(2_000_000, 0, 1), trips=2), kernel(None, flops=131_072e6)], [], [])
    listed = kernels.listed(found, CHIP)
    assert [(row["runs"], row["cycles"], row["bound"]) for row in listed] == [
        (2, 4e6, "bundles"), (1, pytest.approx(1e6), kernels.PEAK),
    ]  # fmt: skip
    lines = describe.kernels_text(listed).splitlines()
    assert "estimated" in lines[0] and lines[1].endswith("bundles, 1 loops of unknown trips counted once")
    assert lines[2].split()[:3] == ["kernel", "1", "1.00"]


@pytest.mark.parametrize("seconds, told", [(22.4, ", kernels counted in 22 s)"), (0.3, "compiled in 169 s)")])
def test_the_report_tells_what_counting_took(seconds, told):
    took = {"trace_s": 18.0, "compile_s": 169.0, "count_s": seconds, "cached": False, "libtpu": "0.0.52"}
    slices = {"name": "v5e:1x1", "chips": 1}
    report = {"stage_name": "encoder", "topology": slices, "mesh": {"data": 1}, "batch": {"images": 8}, "compile": took}
    assert told in describe._head(report)


# A compiled program (shortened): a kernel of three arrays, of which the last is also its second result.
CALLED = """ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %at.1 = s32[2]{0:T(128)S(1)} constant({0, 1})
  %maps = (bf16[2,8,128]{2,1,0}, pred[]) parameter(0)
  %map.1 = bf16[2,8,128]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%maps), index=0
  %taps.1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %blur.7 = (f32[8,128]{1,0:T(8,128)}, bf16[2,8,128]{2,1,0}) custom-call(%at.1, %taps.1, /*index=2*/%map.1), \
custom_call_target="tpu_custom_call", operand_layout_constraints={s32[2]{0}, f32[8,128]{1,0}, bf16[2,8,128]{2,1,0}}, \
output_to_operand_aliasing={{1}: (2, {})}, frontend_attributes={kernel_metadata={}}, metadata={op_name="jit(f)/blur"}, \
backend_config={"aliasing_operands":{"lists":[]},"custom_call_config":{"body":"AAAA","needs_layout_passes":true},\
"flag_configs":[],"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"294912"}]}
}
"""


def called(text=CALLED):
    """Returns the computation and the instruction of the kernel in a program's text."""
    module = parse.parse(text)
    computation = module.computations[module.entry]
    return computation, next(i for i in computation.instructions if mosaic.is_kernel(i))


def test_a_kernel_is_handed_over_with_all_that_its_compilation_needs():
    kernel = schedules._kernel(*called())
    assert json.loads(kernel.pop("settings")) == {
        "custom_call_config": {"body": "AAAA", "needs_layout_passes": True}, "flag_configs": [],
    }  # fmt: skip
    assert kernel == {
        "name": "blur.7",
        "operands": [["s32", (2,)], ["f32", (8, 128)], ["bf16", (2, 8, 128)]],
        "results": [["f32", (8, 128)], ["bf16", (2, 8, 128)]],
        "aliases": [[2, 1]],
    }
    whole = CALLED.replace("{{1}: (2, {})}", "{{}: (2, {})}")  # one result, which is no tuple
    assert schedules._kernel(*called(whole))["aliases"] == [[2, 0]]
    assert (
        schedules._kernel(*called(CALLED.replace("output_to_operand_aliasing={{1}: (2, {})}, ", "")))["aliases"] == []
    )


def test_a_kernel_alone_is_the_same_call():
    text = compile_kernels.lower(schedules._kernel(*called()), jax.devices()[0]).as_text()
    (call,) = (line for line in text.splitlines() if "stablehlo.custom_call" in line)
    assert "@tpu_custom_call" in call and r"\22body\22: \22AAAA\22" in call
    assert "output_tuple_indices = [1], operand_index = 2" in call
    assert call.endswith(
        ": (tensor<2xi32>, tensor<8x128xf32>, tensor<2x8x128xbf16>) -> (tensor<8x128xf32>, tensor<2x8x128xbf16>)"
    )


@pytest.mark.parametrize(
    "old, new, same",
    [
        ("blur.7", "blur.12", True),
        ("S(1)", "", True),  # where the program around it holds its operands
        ("294912", "131072", True),
        ("AAAA", "BBBB", False),
        ("s32[2]", "s32[3]", False),
        ("= (f32[8,128]", "= (f32[16,128]", False),
        ("{{1}: (2, {})}", "{{0}: (1, {})}", False),
        ('"flag_configs":[]', '"flag_configs":[],"scoped_memory_configs":[{"memory_space":1}]', False),
    ],
)
def test_kernels_are_equal_if_they_compile_to_the_same(old, new, same):
    def digest(text):
        computation, instruction = called(text)
        return schedules._digest(schedules._kernel(computation, instruction), instruction, CHIP)

    assert (digest(CALLED) == digest(CALLED.replace(old, new))) is same


def test_counts_are_those_of_a_generation_and_of_flags(monkeypatch):
    computation, instruction = called()
    kernel = schedules._kernel(computation, instruction)
    names = ("v5e:1x1", "v5e:4x4", "v6e:1x1")
    one, other_slice, other_chip = (schedules._digest(kernel, instruction, topology.parse(name)) for name in names)
    assert one == other_slice != other_chip
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
    assert schedules._digest(kernel, instruction, CHIP) != one


@pytest.mark.parametrize("name", ["blur_3x3", "blur_3x3.7", "blur_3x3.7.clone.12", "blur_3x3.remat2"])
def test_a_kernel_is_called_as_it_was_before_the_compiler_made_names_unique(name):
    program = cost.analyse(parse.parse(CALLED.replace("blur.7", name)), 1, {name: Schedule(9, 0, 0)})
    assert [(o.kernel, o.schedule) for o in program.operations if o.kernel] == [("blur_3x3", (9, 0, 0))]


def test_types_of_hlo():
    kinds = {"pred": "bool", "bf16": "bfloat16", "f32": "float32", "s8": "int8", "u16": "uint16", "s4": "int4"}
    kinds |= {"f8e4m3fn": "float8_e4m3fn"}
    assert {kind: compile_kernels._dtype(kind).name for kind in kinds} == kinds


@needs_compiler
def test_a_kernel_that_cannot_be_counted_is_told_and_left_out(capfd, tmp_path):
    """The first has no module, the second no settings."""
    second = CALLED.replace("main", "other").replace("blur.7", "blur.8").replace("backend_config", "configuration")
    module = parse.parse(CALLED + second.replace("ENTRY ", ""))
    assert schedules.count(module, CHIP, tmp_path) == {} and not list(tmp_path.iterdir())
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "preflight: counting the schedules of 1 kernels, 0 more are known"
    assert lines[1].startswith("preflight: no schedule of blur.7: blur.7: ") and len(lines) == 2


def compiled_kernels(monkeypatch, folder, function, *shapes, name="v5e:1x1"):
    """Compiles a function of arrays of these (shape, dtype); returns its kernels by name."""
    monkeypatch.setenv("FASTVLM_CACHE", str(folder))
    slices = topology.parse(name)
    mesh = sharding.make_mesh((1, 1, 1, 1), topology.devices(slices)[:1])
    whole = NamedSharding(mesh, P())
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape, dtype in shapes]
    found, _, _ = compile(lambda: (jax.jit(function).lower(*args), None, None), slices, mesh)
    again, _, _ = compile(lambda: (jax.jit(function).lower(*args), None, None), slices, mesh)
    assert again.cached and again.schedules == found.schedules
    operations = cost.analyse(parse.parse(found.text), 1, found.schedules).operations
    return {o.kernel: o for o in operations if o.kernel}


@needs_compiler
def test_real_kernels_of_known_loops_and_products(monkeypatch, tmp_path):
    """24 steps of a grid with 10 and 37 turns inside; and a product [1024, 512] x [512, 1024] in 8 steps."""

    def looped(turns):
        def body(x_ref, y_ref):
            def turn(i, carry):
                y_ref[...] = jnp.tanh(y_ref[...] + x_ref[...])
                return carry

            y_ref[...] = x_ref[...]
            jax.lax.fori_loop(3, 3 + turns, turn, 0)

        return body

    def product(x_ref, w_ref, y_ref):
        y_ref[...] = jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32)

    def program(x, y, w):
        block = pl.BlockSpec((64, 128), lambda i, j: (i, j))
        made = [
            pl.pallas_call(
                looped(turns), grid=(6, 4), in_specs=[block], out_specs=block, name=name,
                out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            )(x) for name, turns in (("few", 10), ("many", 37))
        ]  # fmt: skip
        in_specs = [pl.BlockSpec((256, 512), lambda i, j: (i, 0)), pl.BlockSpec((512, 512), lambda i, j: (0, j))]
        shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
        out_specs = pl.BlockSpec((256, 512), lambda i, j: (i, j))
        return *made, pl.pallas_call(
            product, grid=(4, 2), in_specs=in_specs, out_specs=out_specs, out_shape=shape, name="product"
        )(y, w)

    found = compiled_kernels(
        monkeypatch, tmp_path, program,
        ((384, 512), jnp.float32), ((1024, 512), jnp.bfloat16), ((512, 1024), jnp.bfloat16),
    )  # fmt: skip
    assert {name for name, o in found.items() if o.schedule.unknown} == set()
    few, many, made = (found[name].schedule for name in ("few", "many", "product"))
    turn, rest = divmod(many.bundles - few.bundles, 24 * 27)
    assert rest == 0 and 8 <= turn <= 40  # eight vectors are stored, one a bundle
    assert 24 * 8 < few.bundles - 24 * 10 * turn < 24 * 200
    assert made.rows == 1024 * (512 // 128) * (1024 // 128) // 4  # four units of 128 x 128
    assert 0.9 * made.rows < made.bundles < 3 * made.rows
    assert found["product"].kernel_flops == 0 and found["product"].traffic <= 4 * 2**18 + 8 * 2**19 + 8 * 2**19


@needs_compiler
def test_kernels_of_a_loop_are_counted_once_and_for_all_programs(monkeypatch, capfd, tmp_path):
    """Depthwise 3x3, forward and backward, in a loop of 5 turns: 32 vectors of the result, at 9 taps and 4 units."""

    def loop(x, taps):
        def turn(x, _):
            y = depthwise_tpu.forward(x, taps)
            return depthwise_tpu.forward(y, taps) + depthwise_tpu.backward(x, taps, y)[0], None

        return jax.lax.scan(turn, x, None, length=5)[0]

    shapes = ((1, 16, 16, 128), jnp.bfloat16), ((3 * 3 + 1, 128), jnp.float32)
    found = compiled_kernels(monkeypatch, tmp_path, loop, *shapes)
    assert {name: o.trips for name, o in found.items()} == {"depthwise_3x3": 5, "depthwise_3x3_backward": 5}
    forward, backward = (found[name].schedule.bundles for name in found)
    least = 32 * 9 * 2 / 4
    assert least < forward < 5 * least and 2 * least < backward < 5 * least
    assert "counting the schedules of 2 kernels, 0 more are known" in capfd.readouterr().err
    counts = sorted((cache_folder() / "kernels").iterdir())
    assert [file.suffix for file in counts] == [".json"] * 2
    counts[0].write_text("{")
    alone = compiled_kernels(
        monkeypatch, tmp_path, lambda x, taps: depthwise_tpu.backward(jnp.sin(x), taps, x), *shapes
    )
    assert [o.schedule.bundles for o in alone.values()] == [backward]
    other = compiled_kernels(monkeypatch, tmp_path, lambda x, taps: depthwise_tpu.forward(jnp.sin(x), taps), *shapes)
    assert [o.schedule.bundles for o in other.values()] == [forward]
    told = capfd.readouterr().err
    assert told.count("counting the schedules of 1 kernels, 0 more are known") == 1  # the damaged file, made anew
    assert sorted((cache_folder() / "kernels").iterdir()) == counts and "LIBTPU_INIT_ARGS" not in os.environ


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:2x2x1", "v6e:1x1", "v7x:2x2x1"])
def test_kernels_are_counted_on_every_generation(monkeypatch, tmp_path, name):
    shapes = ((2, 16, 16, 128), jnp.bfloat16), ((3 * 3 + 1, 128), jnp.float32)
    found = compiled_kernels(monkeypatch, tmp_path, depthwise_tpu.forward, *shapes, name=name)
    images = 1 if name[:3] in ("v4:", "v5p") else 2  # two cores take an image each
    least = images * 32 * 9 * 2 / 4
    assert least < found["depthwise_3x3"].schedule.bundles < 5 * least


@needs_compiler
def test_kernels_of_shards_are_counted_as_one_device_runs_them(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path))
    slices = topology.parse("v5e:2x2")
    mesh = sharding.make_mesh((1, 1, 4, 1), topology.devices(slices))

    def double(x_ref, y_ref):
        y_ref[...] = x_ref[...] + x_ref[...]

    def lower():
        block = pl.BlockSpec((1, 64, 128), lambda i: (i, 0, 0))

        def own(x):
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return pl.pallas_call(double, grid=(len(x),), in_specs=[block], out_specs=block, out_shape=shape)(x)

        on_shards = jax.shard_map(own, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False)
        x = jax.ShapeDtypeStruct((48, 64, 128), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
        return jax.jit(on_shards).lower(x), None, None

    compiled, _, _ = compile(lower, slices, mesh)
    (counted,) = compiled.schedules.values()
    assert 12 * 8 < counted.bundles < 12 * 100  # eight vectors a grid step, and 12 of 48 steps


@needs_compiler
@pytest.mark.full
def test_attention_takes_longer_than_at_peak(monkeypatch, tmp_path):
    B, T, K, G, E = 1, 512, 2, 2, 64

    def program(q, k, v, segments):
        def loss(q, k, v):
            return jnp.sum(splash_attention(q, k, v, segments, segments).astype(jnp.float32))

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    bf16, key = jnp.bfloat16, ((B, T, K, E), jnp.bfloat16)
    found = compiled_kernels(monkeypatch, tmp_path, program, ((B, T, K, G, E), bf16), key, key, ((B, T), jnp.int32))
    assert len(found) == 3 and all("splash" in name for name in found)
    for operation in found.values():
        cycles, bound = kernels.cycles(operation, CHIP)
        # Heads of 64 fill half of a unit of 128.
        least = operation.kernel_flops / CHIP.generation.flops_per_cycle
        assert bound in ("bundles", "matrix units") and 1.5 * least < cycles < 6 * least
        assert math.isclose(operation.traffic, operation.traffic) and operation.traffic > 0
