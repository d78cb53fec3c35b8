"""The machine code of the products' tiles: as many multiply-adds as a tile says, and nothing beside them in vain."""

import pytest
from rnnfast_kernels.cpu.ir.memory import PREFETCHING_ROWS
from tile_code import MULTIPLY_ADD, PROCESSORS, loops, target_of

SHAPES = [(processor, gates) for processor in PROCESSORS for gates in (1, 3, 4)]


@pytest.mark.parametrize(("processor", "gates"), SHAPES)
def test_inner_loops(processor, gates):
    chosen = target_of(processor)
    multiply_add = "mulps" if processor == "sse" else MULTIPLY_ADD
    for (rows, vectors), each in loops(processor, chosen, gates).items():
        products = rows * vectors
        assert {loop.count(multiply_add) for loop in each} == {products, products * chosen.unroll}
        for loop in each:
            lines = loop.count(multiply_add) // products
            assert loop.on_stack() == 0
            assert loop.count("v?broadcastss|ld1r(?:.4s)?|dup") <= rows * lines
            assert loop.count("v?mov[ua]ps|v?broadcastss|v?movss|ldr|ldur|ldp|ld1r(?:.4s)?|shufps") <= (
                (rows + vectors) * lines if processor != "sse" else 3 * products
            )


@pytest.mark.parametrize("processor", ["avx512", "neoverse-n1", "neoverse-v1", "apple-m1"])
def test_no_broadcast_that_an_operand_carries(processor):
    """AVX-512 multiplies by an element in memory that is used once, NEON by an element of a register."""
    checked = 0
    for (rows, vectors), each in loops(processor, target_of(processor), 1).items():
        for loop in each:
            if rows >= 3 and (vectors == 1 or processor != "avx512"):
                checked += 1
                assert loop.count("v?broadcastss|ld1r(?:.4s)?|dup") == 0
    assert checked


@pytest.mark.parametrize("processor", PROCESSORS)
def test_tiles_of_several_rows_ask_for_a_cache_line_with_every_line_of_a_panel(processor):
    chosen = target_of(processor)
    for (rows, _), each in loops(processor, chosen, 4).items():
        asked = [loop.count("prefetch\\w*|prfm") for loop in each]
        assert all(asked) if rows >= PREFETCHING_ROWS else not any(asked)
