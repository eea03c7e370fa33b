"""Compiled for TPUs by their own compiler, which needs none: nothing runs here."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from rope_cases import CASES
from tpu_helpers import MOVES, loop_bodies, results, shapes_on, tiny

import jrope
from jrope.batch.engine import Engine
from jrope.batch.lowering import lower_decode, lower_share
from jrope.errors import JropeError
from jrope.model.products import linear
from jrope.plan.compiled import EFFORT
from jrope.rope import ROPE_TYPES, DynamicNTK, DynamicYarn, Rope, rotate, table
from jrope.tree import flatten
from jrope.weights import int8


@pytest.fixture(scope="module")
def one():
    return jrope.mesh("model=1", on="v5e:1x1")


@pytest.fixture
def little_effort():
    """For what has to compile, in a third of the time; not for what it becomes."""
    jax.config.update(EFFORT, -1.0)
    yield
    jax.config.update(EFFORT, 0.0)


def compiled(mesh, function, *shapes):
    """The program of a function of (shape, dtype) for a mesh's devices."""
    where = NamedSharding(mesh, PartitionSpec())
    given = [jax.ShapeDtypeStruct(*shape, sharding=where) for shape in shapes]
    return jax.jit(function).lower(*given).compile()


@pytest.mark.parametrize("precision", ["parity", "accurate"])
def test_every_method_compiles(one, little_effort, precision):
    plain = Rope(theta=5e5, rotary_dim=128, condense=3.0, precision=precision)
    first = {kind: cases[0] for kind, cases in CASES.items() if cases}
    ropes = [plain, *(case.rope(precision=precision) for case in first.values())]
    assert {type(rope.scaling) for rope in ropes} >= {*ROPE_TYPES.values()}

    def tables(positions, lengths):
        return [
            table(rope, positions, length=lengths if rope.needs_length else None)
            for rope in ropes
        ]

    compiled(one, tables, ((2, 32), jnp.int32), ((2,), jnp.int32))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_both_layouts_compile_in_both_precisions(one, layout):
    def turned(x, cos, sin):
        how = ("parity", "accurate")
        return [rotate(x, cos, sin, layout=layout, precision=p) for p in how]

    angles = ((2, 8, 64), jnp.float32)
    compiled(one, turned, ((2, 8, 4, 128), jnp.bfloat16), angles, angles)


def test_quantising_compiles(one):
    program = compiled(one, int8._quantize, ((256, 512), jnp.bfloat16))
    assert "s8[256,512]" in program.as_text()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_loop_reads_integers_as_they_lie(one, form):
    """No weight is widened whole, and none lies in another order beside the loop."""
    out, width, groups = 2048, 1024, 1024 // 128
    held = {
        "int8": (((out, width), jnp.int8), ((out,), jnp.float32)),
        "int4": (((out, width // 8), jnp.uint32), ((out, groups), jnp.bfloat16)),
    }[form]

    def steps(weight, scale, x):
        def step(_, x):
            return linear({"weight": weight, "scale": scale}, x)[..., :width]

        return jax.lax.fori_loop(0, 8, step, x)

    text = compiled(one, steps, *held, ((8, 1, width), jnp.bfloat16)).as_text()
    wide = results(loop_bodies(text), "fusion|convert|copy")
    assert wide and not [n for kind, n in wide if kind[0] in "bf" and n >= out * width]
    words = out * width // 8
    assert not [x for x in results(text, MOVES) if x == ("u32", words)]


ENGINE = {"capacity": 32, "slots": 4, "piece": 16, "chunk": 4, "logprobs": False}


def test_a_batchs_programs_compile_on_a_mesh(little_effort):
    mesh, config = jrope.mesh("data=2,model=2", on="v5e:2x2"), tiny()
    engine = Engine(shapes_on(mesh, config), config, structures=True, **ENGINE)
    made = engine.compile()
    ways = [made.decode[False], *made.ruled.values(), *made.enter.values()]
    slots = 2 * engine.stats.slots * engine.width * 2 * 128 * 2  # bytes of bfloat16
    for program in [*ways, made.extend, made.clean]:
        assert program.memory_analysis().alias_size_in_bytes >= slots // mesh.size
        assert "u16[" not in program.as_text()  # as a CPU would hold the slots


@pytest.mark.parametrize("kind", ["guesses", "a shared prefix"])
def test_what_a_batch_runs_on_one_device_alone_compiles(one, little_effort, kind):
    config = tiny()
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=SingleDeviceSharding(one.devices.flat[0])
        ),
        shapes_on(one, config),
    )
    same = {"slots": 4, "capacity": 32}
    if kind == "guesses":
        how = {"size": 4, "key": jax.random.key(0), "scored": False}
        how["speculate"] = jrope.PromptLookup(tokens=2)
        lowered = lower_decode(params, config, **same, **how)[1]
    else:
        lowered = lower_share(params, config, **same, behind=(16, 2))
    assert "ui16>" not in lowered.as_text()  # as a CPU would hold the slots
    assert lowered.compile().memory_analysis().alias_size_in_bytes


LENGTHS = {"theta": 1e4, "rotary_dim": 128}
DYNAMIC = Rope(**LENGTHS, scaling=DynamicNTK(factor=2, original_length=16))
YARN = Rope(**LENGTHS, scaling=DynamicYarn(original_length=16))
RUNS = {  # rope, form of the parameters, rows, prompt, chunk
    "one chunk": (YARN, "bfloat16", 1, 384, None),
    "chunks": (
        dataclasses.replace(DYNAMIC, layout="interleaved", precision="accurate"),
        *("int8", 2, 40, 16),
    ),
    "growing": (
        dataclasses.replace(DYNAMIC, lengths="growing"),
        *("bfloat16", 2, 40, None),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_generation_compiles_to_a_tpus_own_program(one, little_effort, name):
    rope, form, rows, prompt, chunk = RUNS[name]
    config = tiny(rope)
    params, tokens = shapes_on(one, config, form), np.ones((rows, prompt), np.int32)
    programs = jrope.compile_ahead(params, tokens, config=config, prefill_chunk=chunk)
    texts = {kind: program.as_text() for kind, program in programs.items()}
    assert ("prefill_on" in texts) == (chunk is not None)
    assert ("tpu_custom_call" in texts["prefill"]) == (prompt == 384)
    assert "BNH,BXH->BNX" in texts["decode"] and "BNS,BSX" not in texts["decode"]
    if chunk:  # a CPU widens int8 weights block by block, in loops
        assert "s8[512,256]" in texts["prefill"] and " while(" not in texts["prefill"]


def test_devices_tell_each_other_little_and_move_no_cache():
    """Two query heads meet a key head of each device's own, of two rows."""
    mesh = jrope.mesh("data=2,model=2", on="v5e:2x2")
    config = tiny(num_hidden_layers=2)
    params, tokens = shapes_on(mesh, config), np.ones((4, 40), np.int32)
    programs = jrope.compile_ahead(params, tokens, config=config, max_new_tokens=8)
    text = programs["decode"].as_text()
    sums = re.findall(r"\[2,1,256\]\S* all-reduce", text)
    assert len(sums) == 2 * 2 + 1, "two a layer, and the embedding's rows"
    gathered = results(text, "all-gather|all-gather-start")
    assert {*gathered} <= {("s32", 2 * 2 * 2)}, "each device's best token"
    slots = programs["decode"].out_info[0].keys[0].size // mesh.size
    assert not [size for _, size in results(text, f"{MOVES}|convert") if size == slots]


def test_a_single_device_moves_no_cache(one):
    """Of a row, whose heads share a tile."""
    config = tiny()
    params, tokens = shapes_on(one, config), np.ones((1, 40), np.int32)
    programs = jrope.compile_ahead(params, tokens, config=config, max_new_tokens=8)
    slots = programs["decode"].out_info[0].keys[0].size
    found = results(programs["decode"].as_text(), f"{MOVES}|convert")
    assert not [size for _, size in found if size == slots]


def test_arrays_become_shapes_on_devices_that_are_not_here(one):
    config = tiny()
    params = jrope.init_params(jax.random.key(0), config)
    placed = flatten(jrope.shard(params, one, config))
    assert {type(x) for x in placed.values()} == {jax.ShapeDtypeStruct}
    assert all(x.sharding.mesh == one for x in placed.values())


@pytest.mark.parametrize(
    ("text", "on", "message"),
    [
        ("model=2", "v5e:2x2", "model=2 has 2 devices, v5e:2x2 has 4; name all of"),
        ("model=2", "v5e:3x5", "libtpu knows no v5e:3x5: .*3x5"),
        ("model=2", "h100", "libtpu knows no h100"),
    ],
)
def test_other_meshes_are_refused(text, on, message):
    with pytest.raises(JropeError, match=message):
        jrope.mesh(text, on=on)


@pytest.mark.parametrize(
    ("text", "on"),
    [
        ("data=2,model=8", "v6e:4x4"),
        ("data=2,model=8,replica=16", "v5e:16x16"),
        ("model=4", "v4:2x2x1"),
        ("model=8", "v5p:2x2x2"),
    ],
)
def test_axes_may_share_those_of_a_torus(text, on):
    assert jrope.mesh(text, on=on).size == np.prod(
        [int(part.split("=")[1]) for part in text.split(",")]
    )
