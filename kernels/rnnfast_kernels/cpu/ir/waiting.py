"""How threads wait for one another: a counter in memory, and what to do between two looks at it."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rnnfast_kernels.cpu.ir.memory import pointer
from rnnfast_kernels.cpu.ir.vector import INT32, INT64, declared
from rnnfast_kernels.cpu.target import processor


@intrinsic
def arrive(typing, address):
    """Add one to a counter; what was written before is seen by whoever sees the count."""

    def lower(context, builder, sig, args):
        builder.atomic_rmw("add", pointer(builder, args[0], INT64), INT64(1), "acq_rel")
        return context.get_dummy_value()

    return types.void(types.int64), lower


@intrinsic
def claim(typing, address, count):
    """Add one to a counter that stands at `count`, and say whether it did."""

    def lower(context, builder, sig, args):
        place = pointer(builder, args[0], INT64)
        found = builder.cmpxchg(place, args[1], builder.add(args[1], INT64(1)), "acq_rel", "acquire")
        return builder.extract_value(found, 1)

    return types.boolean(types.int64, types.int64), lower


@intrinsic
def count_of(typing, address):
    """Read a counter that other threads add to."""

    def lower(context, builder, sig, args):
        return builder.load_atomic(pointer(builder, args[0], INT64), "acquire", 8)

    return types.int64(types.int64), lower


@intrinsic
def pause(typing):
    """Tell the processor that a loop is waiting, where it has an instruction for that."""

    def lower(context, builder, sig, args):
        triple = processor().triple
        if triple.startswith("x86_64"):
            builder.call(declared(builder, "llvm.x86.sse2.pause", ir.VoidType()), [])
        elif triple.startswith(("aarch64", "arm64")):
            builder.call(declared(builder, "llvm.aarch64.hint", ir.VoidType(), INT32), [INT32(1)])
        return context.get_dummy_value()

    return types.void(), lower


@intrinsic
def call_address(typing, address):
    """Call a C function without arguments."""

    def lower(context, builder, sig, args):
        builder.call(builder.inttoptr(args[0], ir.FunctionType(INT32, []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), lower


OPERATIONS = {"arrive": arrive, "claim": claim, "count_of": count_of, "pause": pause, "call_address": call_address}
