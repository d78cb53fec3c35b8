"""Loads and stores of vectors, integers and flags, at raw addresses.

A vector's address is a multiple of its element's size, no more. `operations(target)` gives the functions by the names
that kernels use; those of vectors need to know the target's types: that of registers, which is also that of what
kernels keep for themselves, and that of the tensors they are given.
"""

import functools

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rnnfast_kernels.cpu.ir import halves
from rnnfast_kernels.cpu.ir.vector import INT32, INT64, Vec, declared, splat, suffix, zeros_like
from rnnfast_kernels.cpu.job import SIGNAL
from rnnfast_kernels.cpu.target import Target

# Bytes of a cache line, and rows from which on a tile has time to ask for one with each line of its panel.
CACHE_LINE, PREFETCHING_ROWS = 64, 3


def pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.inttoptr(address, kind.as_pointer())


def prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for a cache line, for reading, in the second-level cache. Any address will do."""
    place, read, second_level, data = pointer(builder, address, ir.IntType(8)), INT32(0), INT32(2), INT32(1)
    kinds = [place.type, INT32, INT32, INT32]
    builder.call(declared(builder, "llvm.prefetch.p0", ir.VoidType(), *kinds), [place, read, second_level, data])


def lane_mask(builder: ir.IRBuilder, vec: Vec, count: ir.Value) -> ir.Value:
    """Which lanes come before `count`."""
    kind = ir.VectorType(INT64, vec.lanes)
    lanes = ir.Constant(kind, list(range(vec.lanes)))
    return builder.icmp_signed("<", lanes, splat(builder, count, vec.lanes))


def load_all(builder: ir.IRBuilder, vec: Vec, address: ir.Value) -> ir.Value:
    loaded = builder.load(pointer(builder, address, vec.llvm))
    loaded.align = vec.item
    return loaded


def store_all(builder: ir.IRBuilder, vec: Vec, address: ir.Value, value: ir.Value) -> None:
    builder.store(value, pointer(builder, address, vec.llvm), align=vec.item)


def load_first(builder: ir.IRBuilder, vec: Vec, address: ir.Value, count: ir.Value) -> ir.Value:
    """Load the first `count` lanes; the others are 0 and their memory is not touched."""
    if isinstance(count, ir.Constant) and count.constant >= vec.lanes:
        return load_all(builder, vec, address)
    whole = builder.icmp_signed(">=", count, INT64(vec.lanes))
    with builder.if_else(whole, likely=True) as (then, otherwise):
        with then:
            full, full_block = load_all(builder, vec, address), builder.block
        with otherwise:
            place = vec.llvm.as_pointer()
            masks = ir.VectorType(ir.IntType(1), vec.lanes)
            masked = declared(builder, f"llvm.masked.load.{suffix(vec)}.p0", vec.llvm, place, INT32, masks, vec.llvm)
            partial = builder.call(
                masked,
                [
                    pointer(builder, address, vec.llvm),
                    INT32(vec.item),
                    lane_mask(builder, vec, count),
                    ir.Constant(vec.llvm, None),
                ],
            )
            partial_block = builder.block
    value = builder.phi(vec.llvm)
    value.add_incoming(full, full_block)
    value.add_incoming(partial, partial_block)
    return value


def store_first(builder: ir.IRBuilder, vec: Vec, address: ir.Value, value: ir.Value, count: ir.Value) -> None:
    """Store the first `count` lanes."""
    whole = builder.icmp_signed(">=", count, INT64(vec.lanes))
    with builder.if_else(whole, likely=True) as (then, otherwise):
        with then:
            store_all(builder, vec, address, value)
        with otherwise:
            place = vec.llvm.as_pointer()
            masks = ir.VectorType(ir.IntType(1), vec.lanes)
            masked = declared(
                builder, f"llvm.masked.store.{suffix(vec)}.p0", ir.VoidType(), vec.llvm, place, INT32, masks
            )
            builder.call(
                masked,
                [value, pointer(builder, address, vec.llvm), INT32(vec.item), lane_mask(builder, vec, count)],
            )


def load_io(target: Target, builder: ir.IRBuilder, address: ir.Value, count: ir.Value) -> ir.Value:
    """Load the first `count` lanes from a given tensor; the others are 0."""
    if target.io == target.dtype:
        return load_first(builder, Vec(target.dtype, target.lanes), address, count)
    return halves.widened(builder, target.io, load_first(builder, Vec("int16", target.lanes), address, count))


def store_io(target: Target, builder: ir.IRBuilder, address: ir.Value, value: ir.Value, count: ir.Value) -> None:
    """Store the first `count` lanes in a given tensor."""
    if target.io == target.dtype:
        store_first(builder, Vec(target.dtype, target.lanes), address, value, count)
    else:
        bits = halves.narrowed(builder, target.io, value)
        store_first(builder, Vec("int16", target.lanes), address, bits, count)


@intrinsic
def load_int(typing, address):
    """Read an int64."""

    def lower(context, builder, sig, args):
        return builder.load(pointer(builder, args[0], INT64))

    return types.int64(types.int64), lower


@intrinsic
def store_int(typing, address, value):
    """Write an int64."""

    def lower(context, builder, sig, args):
        builder.store(args[1], pointer(builder, args[0], INT64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), lower


@intrinsic
def load_flag(typing, address):
    """Read a bool of one byte."""

    def lower(context, builder, sig, args):
        byte = builder.load(pointer(builder, args[0], ir.IntType(8)))
        return builder.icmp_unsigned("!=", byte, ir.IntType(8)(0))

    return types.boolean(types.int64), lower


def loader(vec: Vec, load):
    """A function for kernels: the first `count` elements from `address`, 0 in the lanes after them."""

    @intrinsic
    def load_vector(typing, address, count):
        def lower(context, builder, sig, args):
            return load(builder, *args)

        return vec(types.int64, types.int64), lower

    return load_vector


def storer(vec: Vec, store):
    """A function for kernels: write the first `count` lanes to `address`."""

    @intrinsic
    def store_vector(typing, address, value, count):
        def lower(context, builder, sig, args):
            store(builder, *args)
            return context.get_dummy_value()

        return types.void(types.int64, vec, types.int64), lower

    return store_vector


def tuple_loader(vec: Vec, load, size: int):
    """A function for kernels: the first `count` lanes of `size` vectors, `stride` bytes apart."""

    @intrinsic
    def load_tuple(typing, address, stride, count):
        def lower(context, builder, sig, args):
            start, step, lanes = args
            spots = (builder.add(start, builder.mul(step, INT64(place))) for place in range(size))
            loaded = [load(builder, spot, lanes) for spot in spots]
            return context.make_tuple(builder, sig.return_type, loaded)

        kind = types.UniTuple(vec, size) if size else types.Tuple(())
        return kind(types.int64, types.int64, types.int64), lower

    return load_tuple


def signal_loader(target: Target, size: int):
    """A function for kernels: `size` signals of a row at a step, from a unit on; `table` has a `SIGNAL` for each."""
    vec = Vec(target.dtype, target.lanes)

    @intrinsic
    def load_signals(typing, table, step, row, unit, count):
        def load(builder, place, step, row, unit, count):
            address, by_step, by_row, by_unit = (
                builder.load(pointer(builder, builder.add(place, INT64(8 * n)), INT64)) for n in range(4)
            )
            for index, stride in ((step, by_step), (row, by_row), (unit, by_unit)):
                address = builder.add(address, builder.mul(index, stride))
            # The lanes of one unit, or of all.
            with builder.if_else(builder.icmp_signed("==", by_unit, INT64(0))) as (then, otherwise):
                with then:
                    first = load_io(target, builder, address, INT64(1))
                    lanes = ir.Constant(ir.VectorType(INT32, vec.lanes), [0] * vec.lanes)
                    same = builder.shuffle_vector(first, first, lanes)
                    same_block = builder.block
                with otherwise:
                    each = load_io(target, builder, address, count)
                    each_block = builder.block
            value = builder.phi(vec.llvm)
            value.add_incoming(same, same_block)
            value.add_incoming(each, each_block)
            return value

        def lower(context, builder, sig, args):
            start, *indices = args
            row_pointers = (builder.add(start, INT64(8 * len(SIGNAL.names) * n)) for n in range(size))
            loaded = [load(builder, place, *indices) for place in row_pointers]
            return context.make_tuple(builder, sig.return_type, loaded)

        kind = types.UniTuple(vec, size) if size else types.Tuple(())
        return kind(*[types.int64] * 5), lower

    return load_signals


def tuple_storer(store):
    """A function for kernels: store the first `count` lanes of each vector of a tuple, `stride` bytes apart."""

    @intrinsic
    def store_tuple(typing, address, stride, values, count):
        def lower(context, builder, sig, args):
            start, step, packed, lanes = args
            for place in range(len(values)):
                spot = builder.add(start, builder.mul(step, INT64(place)))
                store(builder, spot, builder.extract_value(packed, place), lanes)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, values, types.int64), lower

    return store_tuple


def operations(target: Target) -> dict:
    """Memory functions for the target's vectors, by the names that kernels use."""
    vec = Vec(target.dtype, target.lanes)

    def load(builder, *args):
        return load_first(builder, vec, *args)

    def store(builder, *args):
        store_first(builder, vec, *args)

    take, give = functools.partial(load_io, target), functools.partial(store_io, target)

    @intrinsic
    def zeros(typing):
        def lower(context, builder, sig, args):
            return ir.Constant(vec.llvm, None)

        return vec(), lower

    return {
        "load": loader(vec, load),
        "store": storer(vec, store),
        "load_io": loader(vec, take),
        "store_io": storer(vec, give),
        "tuple_loader": functools.partial(tuple_loader, vec, load),
        "io_tuple_loader": functools.partial(tuple_loader, vec, take),
        "store_tuple": tuple_storer(store),
        "store_io_tuple": tuple_storer(give),
        "zeros": zeros,
        "zeros_like": zeros_like,
        "load_int": load_int,
        "store_int": store_int,
        "load_flag": load_flag,
    }
