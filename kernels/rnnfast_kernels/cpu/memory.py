"""Loads and stores of vectors, integers and flags, at raw addresses.

A vector's address is a multiple of its element's size, no more. `operations(target)` gives the functions by the names
that kernels use; those of vectors need to know the target's type.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rnnfast_kernels.cpu.target import Target
from rnnfast_kernels.cpu.vector import INT32, INT64, Vec, constant, declared, splat, suffix, zeros_like


def pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.inttoptr(address, kind.as_pointer())


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
                    constant(vec, 0.0),
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


@intrinsic
def store_tuple(typing, address, stride, values, count):
    """Store the first `count` lanes of each vector of a tuple, `stride` bytes apart."""

    def lower(context, builder, sig, args):
        start, step, packed, lanes = args
        for place in range(len(values)):
            spot = builder.add(start, builder.mul(step, INT64(place)))
            store_first(builder, values[place], spot, builder.extract_value(packed, place), lanes)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, values, types.int64), lower


def operations(target: Target) -> dict:
    """Memory functions for the target's vectors, by the names that kernels use."""
    vec = Vec(target.dtype, target.lanes)

    @intrinsic
    def load(typing, address, count):
        """The first `count` elements from `address`, 0 in the lanes after them."""

        def lower(context, builder, sig, args):
            return load_first(builder, vec, *args)

        return vec(types.int64, types.int64), lower

    @intrinsic
    def store(typing, address, value, count):
        """Write the first `count` lanes to `address`."""

        def lower(context, builder, sig, args):
            store_first(builder, vec, *args)
            return context.get_dummy_value()

        return types.void(types.int64, vec, types.int64), lower

    @intrinsic
    def zeros(typing):
        def lower(context, builder, sig, args):
            return constant(vec, 0.0)

        return vec(), lower

    def tuple_loader(size: int):
        @intrinsic
        def load_tuple(typing, address, stride, count):
            """`size` vectors, `stride` bytes apart."""

            def lower(context, builder, sig, args):
                start, step, lanes = args
                spots = (builder.add(start, builder.mul(step, INT64(place))) for place in range(size))
                loaded = [load_first(builder, vec, spot, lanes) for spot in spots]
                return context.make_tuple(builder, sig.return_type, loaded)

            kind = types.UniTuple(vec, size) if size else types.Tuple(())
            return kind(types.int64, types.int64, types.int64), lower

        return load_tuple

    return {
        "load": load,
        "store": store,
        "zeros": zeros,
        "tuple_loader": tuple_loader,
        "load_int": load_int,
        "store_int": store_int,
        "load_flag": load_flag,
        "store_tuple": store_tuple,
        "zeros_like": zeros_like,
    }
