"""How the phases of a call run, as LLVM IR: one call from Python, and from there on no interpreter.

A phase is a list of jobs that may run side by side. `share` runs them, taking the next one until none is left; any
number of threads may call it at once, and a late one finds nothing to do. `run` walks the phases and has each shared by
the threads of an OpenMP team (see `pool`) or runs it alone.
"""

from llvmlite import ir

from rnnfast_kernels.cpu.job import JOB, PHASE, PROGRAM, RUN, SHARE, Record

VOID, INT32, INT64 = ir.VoidType(), ir.IntType(32), ir.IntType(64)
ENTRY = ir.FunctionType(VOID, [INT64])


def place(builder: ir.IRBuilder, address: ir.Value, record: Record, field: str) -> ir.Value:
    """Pointer to a field of a record."""
    offset = INT64(8 * record.names.index(field))
    return builder.inttoptr(builder.add(address, offset), INT64.as_pointer())


def element(builder: ir.IRBuilder, address: ir.Value, record: Record, index: ir.Value) -> ir.Value:
    """Load one of the integers that follow a record."""
    offset = builder.add(builder.mul(index, INT64(8)), INT64(8 * len(record.names)))
    return builder.load(builder.inttoptr(builder.add(address, offset), INT64.as_pointer()))


def module() -> ir.Module:
    """`run(program)` and `share(phase)`; `JOB`, which they call, is defined elsewhere."""
    module = ir.Module("rnnfast_schedule")
    job = ir.Function(module, ir.FunctionType(VOID, [INT64, INT64]), JOB)
    share = ir.Function(module, ENTRY, SHARE)
    define_share(share, job)
    define_run(ir.Function(module, ENTRY, RUN), share)
    return module


def define_share(function: ir.Function, job: ir.Function) -> None:
    phase = function.args[0]
    entry, head, body, done = (function.append_basic_block(label) for label in ("entry", "head", "body", "done"))
    builder = ir.IRBuilder(entry)
    task, count = (builder.load(place(builder, phase, PHASE, field)) for field in ("task", "count"))
    following = place(builder, phase, PHASE, "next")
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.atomic_rmw("add", following, INT64(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", index, count), body, done)
    builder.position_at_end(body)
    builder.call(job, [task, element(builder, phase, PHASE, index)])
    builder.branch(head)
    builder.position_at_end(done)
    builder.ret_void()


def define_run(function: ir.Function, share: ir.Function) -> None:
    program = function.args[0]
    entry, head, body, done = (function.append_basic_block(label) for label in ("entry", "head", "body", "done"))
    builder = ir.IRBuilder(entry)
    team, threads, count = (builder.load(place(builder, program, PROGRAM, name)) for name in PROGRAM.names)
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(INT64)
    index.add_incoming(INT64(0), entry)
    builder.cbranch(builder.icmp_signed("<", index, count), body, done)
    builder.position_at_end(body)
    phase = element(builder, program, PROGRAM, index)
    builder.store(INT64(0), place(builder, phase, PHASE, "next"))
    shared = builder.load(place(builder, phase, PHASE, "shared"))
    with builder.if_else(builder.icmp_signed("!=", builder.mul(shared, team), INT64(0))) as (several, alone):
        with several:
            # void GOMP_parallel(void (*fn)(void *), void *data, unsigned num_threads, unsigned flags)
            kind = ir.FunctionType(VOID, [ENTRY.as_pointer(), INT64, INT32, INT32])
            start = builder.inttoptr(team, kind.as_pointer())
            builder.call(start, [share, phase, builder.trunc(threads, INT32), INT32(0)])
        with alone:
            builder.call(share, [phase])
    index.add_incoming(builder.add(index, INT64(1)), builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    builder.ret_void()
