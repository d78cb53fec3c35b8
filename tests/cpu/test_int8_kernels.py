"""Products of int8 numbers: the same results from every instruction set, and those of integer arithmetic."""

import ctypes
from functools import cache

import numpy as np
import pytest
from llvmlite import binding
from rnnfast_kernels.cpu.formats import FORMATS
from rnnfast_kernels.cpu.ir import int8, tile
from rnnfast_kernels.cpu.ir.library import library
from rnnfast_kernels.cpu.plan import panels
from rnnfast_kernels.cpu.target import X86, Target, may_use_amx, processor, target


def int8_target(lanes: int, registers: int, dot: str) -> Target:
    return Target("float32", "float32", lanes, registers, 4, FORMATS["int8"], dot)


AVX512 = "+avx512f,+avx512bw,+avx512vl,+avx2,+avx,+fma"
# Triple ("" is this machine's), processor, features, and how it multiplies.
PROCESSORS = {
    "amx": (
        "",
        "sapphirerapids",
        f"{AVX512},+avx512vnni,+amx-int8,+amx-tile",
        int8_target(16, 32, "amx"),
    ),
    "avx512-vnni": ("", "x86-64-v4", f"{AVX512},+avx512vnni", int8_target(16, 32, "vpdpbusd")),
    "avx512": ("", "x86-64-v4", AVX512, int8_target(16, 32, "vpmaddwd")),
    "avx-vnni": ("", X86["avx2"][0], X86["avx2"][1] + ",+avxvnni", int8_target(8, 16, "vpdpbusd")),
    "avx2": ("", *X86["avx2"], int8_target(8, 16, "vpmaddubsw")),
    "sse": ("", *X86["sse"], int8_target(4, 15, "plain")),
    "neon-dot": ("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon,+dotprod", int8_target(4, 32, "sdot")),
    "neon": ("aarch64-unknown-linux-gnu", "generic", "+neon", int8_target(4, 32, "plain")),
}  # fmt: skip
NEEDS = {
    "amx": "amx-int8",
    "avx512-vnni": "avx512vnni",
    "avx512": "avx512bw",
    "avx-vnni": "avxvnni",
    "avx2": "avx2",
    "sse": "sse2",
}
INSTRUCTION = {
    "amx": "tdpbusd", "avx512-vnni": "vpdpbusd", "avx512": "vpmaddwd", "avx-vnni": "vpdpbusd", "avx2": "vpmaddubsw",
    "neon-dot": "sdot",
}  # fmt: skip
GATES, UNITS, DEPTH = 4, 37, 71
TILES = [(name, rows) for name in NEEDS for rows in (1, 2, 4, 6, 7, 16) if rows <= PROCESSORS[name][3].rows(GATES)]


def machine(name: str) -> binding.TargetMachine:
    triple, cpu, features, _ = PROCESSORS[name]
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    chosen = binding.Target.from_triple(triple or processor().triple)
    reloc = "default" if triple else "static"
    return chosen.create_target_machine(
        cpu=cpu, features=features, opt=3, reloc=reloc, codemodel="jitdefault", jit=True
    )


@cache
def engine(name: str) -> binding.ExecutionEngine:
    module = binding.parse_assembly(str(library(PROCESSORS[name][3], {1, GATES})))
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine(name))
    engine.add_object_file(binding.ObjectFileRef.from_data(machine(name).emit_object(module)))
    engine.finalize_object()
    return engine


def call(name: str, function: str, *args: int) -> None:
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(args))(engine(name).get_function_address(function))(*args)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def quantised(name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows as the kernel quantises them: signed numbers [rows, depth], and the buffer that holds them."""
    chosen, (rows, depth) = PROCESSORS[name][3], x.shape
    row = chosen.vector + chosen.padded(chosen.lines(depth)) * 4
    room = np.zeros((rows + 15, row), np.uint8)
    for n in range(rows):
        call(name, int8.quantise_name(chosen), address(x[n]), depth, address(room[n]) + chosen.vector)
    numbers = room[:rows, chosen.vector : chosen.vector + depth] ^ np.uint8(0x80 if chosen.adds_128 else 0)
    return numbers.view(np.int8), room


def product(name: str, x: np.ndarray, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return the rows' products with the weight [GATES * UNITS, depth] by the tiles of one processor."""
    chosen, (rows, depth) = PROCESSORS[name][3], x.shape
    matrix = panels.Matrix("w_ih", 0, GATES, UNITS, depth, 0)
    buffer = np.zeros(panels.matrix_bytes(chosen, GATES, UNITS, depth), np.uint8)
    panels.pack(chosen, matrix, buffer, weight, bias, scale)
    _, room = quantised(name, x)
    pointers = np.array([address(each) + chosen.vector for each in room], np.int64)
    result = np.empty((rows, -(-UNITS // chosen.lanes), GATES, chosen.lanes), np.float32)
    place = 0
    for first, count in panels.strips(chosen, GATES, UNITS):
        out = np.empty((max(rows, 16), count, chosen.lanes), np.float32)
        function = tile.tile_name(chosen, rows, count)
        call(
            name,
            function,
            address(pointers),
            4,
            address(buffer) + place,
            chosen.lines(depth),
            address(buffer),
            address(out),
            count * chosen.vector,
        )
        place += count * (chosen.head + chosen.lines(depth)) * chosen.vector
        result.reshape(rows, -1, chosen.lanes)[:, first : first + count] = out[:rows]
    return result.transpose(0, 2, 1, 3).reshape(rows, GATES, -1)[:, :, :UNITS].reshape(rows, -1)


def here(name: str) -> bool:
    """Whether this machine runs the code."""
    if name == "amx" and not may_use_amx():
        return False
    return not PROCESSORS[name][0] and binding.get_host_cpu_features().get(NEEDS[name], False)


def case(rows: int, depth: int):
    random = np.random.default_rng(rows * depth)
    x = random.standard_normal((rows, depth)).astype(np.float32)
    x[-1] *= 1e30
    weight = random.integers(-127, 128, (GATES * UNITS, depth), dtype=np.int8)
    weight[0], weight[1] = 127, -127
    scale = random.random(GATES * UNITS, dtype=np.float32) * 1e-3
    return x, weight, scale, random.standard_normal(GATES * UNITS).astype(np.float32)


@pytest.mark.parametrize("depth", [1, 4, DEPTH, 640])
@pytest.mark.parametrize(("name", "rows"), TILES)
def test_products_are_those_of_integers(name, rows, depth):
    """Bit by bit, whatever the instructions: sums of integers, and three roundings behind them."""
    if not here(name):
        pytest.skip(f"no {NEEDS[name]} here")
    x, weight, scale, bias = case(rows, depth)
    largest = np.abs(x).max(1)
    numbers = np.rint(x * (np.float32(127) / largest)[:, None]).astype(np.int64)
    assert (quantised(name, x)[0] == numbers).all()
    sums = (numbers @ weight.astype(np.int64).T).astype(np.float32)
    expected = sums * ((largest / np.float32(127))[:, None] * scale) + bias
    assert (product(name, x, weight, scale, bias) == expected).all()


@pytest.mark.parametrize("name", NEEDS)
def test_rows_that_are_no_ordinary_numbers(name):
    if not here(name):
        pytest.skip(f"no {NEEDS[name]} here")
    x = np.zeros((5, DEPTH), np.float32)
    x[1, 3], x[2], x[3, 70], x[4, 70] = 3e38, 1e-40, np.nan, -np.inf
    numbers, room = quantised(name, x)
    vector = PROCESSORS[name][3].vector
    scales = room[:, vector - 4 : vector].copy().view(np.float32)[:, 0]
    assert not numbers[0].any()
    assert not numbers[2].any()
    assert numbers[1, 3] == 127
    assert scales[1] == np.float32(3e38) / np.float32(127)
    assert np.isfinite(scales[:3]).all()
    assert np.isnan(scales[3:5]).all()


@pytest.mark.parametrize("name", INSTRUCTION)
def test_each_processor_gets_its_instruction(name):
    chosen = PROCESSORS[name][3]
    module = library(chosen, {1, GATES})
    code = machine(name).emit_assembly(binding.parse_assembly(str(module)))
    assert INSTRUCTION[name] in code


@pytest.mark.parametrize("gates", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("weights", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("units", [1, 15, 16, 70, 200])
def test_panels_give_back_what_they_hold(gates, weights, units):
    random = np.random.default_rng(units)
    held = weights if weights.terms > 1 else None
    other = Target("float32", "float32", 8, 16, weights.terms, held, "vpmaddubsw" if weights.scaled else "")
    for chosen in (target("float32", weights.name), other):
        matrix = panels.Matrix("w_hh", 0, gates, units, 11, 0)
        buffer = np.zeros(panels.matrix_bytes(chosen, gates, units, 11), np.uint8)
        weight = random.integers(-127, 128, (gates * units, 11)).astype(weights.array)
        bias, scale = random.random((2, gates * units), dtype=np.float32)
        panels.pack(chosen, matrix, buffer, weight, bias, scale if weights.scaled else None)
        found = panels.unpack(chosen, matrix, buffer)
        assert found[0].dtype == weight.dtype
        assert (found[0] == weight).all()
        assert (found[1] == bias).all()
        assert not weights.scaled or (found[2] == scale).all()


def test_this_machine_is_one_of_those_tested():
    assert target("float32", "int8") in [row[3] for row in PROCESSORS.values()]
