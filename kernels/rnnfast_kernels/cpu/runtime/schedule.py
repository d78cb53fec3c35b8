"""How a call runs, as LLVM IR: from a few addresses to the last job without the interpreter.

`start` makes a call's records from a template (see `recipe`) and runs them. `run` walks the phases of a program; each
is shared by an OpenMP team (see `pool`) or run alone. `share` runs the jobs of a phase, taking the next one until none
is left: any number of threads may call it at once, and a late one finds nothing to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

from rnnfast_kernels.cpu.job import CALL, JOB, PHASE, PROGRAM, RUN, SHARE, START, Record

VOID, BOOL, INT32, INT64 = ir.VoidType(), ir.IntType(1), ir.IntType(32), ir.IntType(64)
ENTRY = ir.FunctionType(VOID, [INT64])


def word(builder: ir.IRBuilder, address: ir.Value, index: ir.Value) -> ir.Value:
    """Pointer to an integer of an array."""
    return builder.inttoptr(builder.add(address, builder.shl(index, INT64(3))), INT64.as_pointer())


def field(builder: ir.IRBuilder, address: ir.Value, record: Record, name: str) -> ir.Value:
    """Pointer to a field of a record."""
    return word(builder, address, INT64(record.names.index(name)))


def fields(builder: ir.IRBuilder, address: ir.Value, record: Record) -> list[ir.Value]:
    """Load all fields of a record."""
    return [builder.load(field(builder, address, record, name)) for name in record.names]


def following(builder: ir.IRBuilder, address: ir.Value, record: Record, index: ir.Value) -> ir.Value:
    """Load one of the integers that follow a record."""
    return builder.load(word(builder, address, builder.add(index, INT64(len(record.names)))))


@contextmanager
def counted(builder: ir.IRBuilder, count: ir.Value) -> Iterator[ir.Value]:
    """A loop over 0 to count."""
    before = builder.block
    head, body, done = (builder.append_basic_block(label) for label in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(INT64)
    index.add_incoming(INT64(0), before)
    builder.cbranch(builder.icmp_signed("<", index, count), body, done)
    builder.position_at_end(body)
    yield index
    index.add_incoming(builder.add(index, INT64(1)), builder.block)
    builder.branch(head)
    builder.position_at_end(done)


def module() -> ir.Module:
    """`start(call)`, `run(program)` and `share(phase)`; `JOB` is defined elsewhere."""
    module = ir.Module("rnnfast_schedule")
    job = ir.Function(module, ir.FunctionType(VOID, [INT64] * 2), JOB)
    start, run, share = (ir.Function(module, ENTRY, name) for name in (START, RUN, SHARE))
    define_share(share, job)
    define_run(run, share)
    define_start(start, run)
    define_fill(ir.Function(module, ir.FunctionType(INT64, [INT64, INT32, INT64]), "memset"))
    return module


def define_fill(function: ir.Function) -> None:
    """C's memset, which code generation calls for large values on the stack: machine code from disk finds no other."""
    goal, byte, count = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    value = builder.trunc(byte, ir.IntType(8))
    eight = builder.mul(builder.zext(value, INT64), INT64(0x0101010101010101))
    words = builder.lshr(count, INT64(3))
    with counted(builder, words) as index:
        builder.store(eight, word(builder, goal, index), align=1)
    done = builder.shl(words, INT64(3))
    with counted(builder, builder.sub(count, done)) as index:
        place = builder.add(goal, builder.add(done, index))
        builder.store(value, builder.inttoptr(place, ir.IntType(8).as_pointer()))
    builder.ret(goal)


def define_start(function: ir.Function, run: ir.Function) -> None:
    call = function.args[0]
    builder = ir.IRBuilder(function.append_basic_block())
    values, which, count, records, program = fields(builder, call, CALL)
    with counted(builder, count) as index:
        base = following(builder, call, CALL, builder.load(word(builder, which, index)))
        value = builder.load(word(builder, values, index))
        builder.store(builder.add(base, value), word(builder, records, index))
    with builder.if_then(builder.icmp_signed("!=", program, INT64(0))):
        builder.call(run, [program])
    builder.ret_void()


def define_share(function: ir.Function, job: ir.Function) -> None:
    phase = function.args[0]
    builder = ir.IRBuilder(function.append_basic_block())
    task, _, _, count, serial, team_size = fields(builder, phase, PHASE)
    ask, start, head, body, done = (
        builder.append_basic_block(label) for label in ("ask", "start", "head", "body", "done")
    )
    entry = builder.block
    builder.cbranch(builder.icmp_signed("!=", team_size, INT64(0)), ask, start)
    builder.position_at_end(ask)
    # int omp_get_num_threads(void)
    size = builder.call(builder.inttoptr(team_size, ir.FunctionType(INT32, []).as_pointer()), [])
    lacking = builder.icmp_signed("<", builder.sext(size, INT64), count)
    builder.branch(start)
    builder.position_at_end(start)
    few = builder.phi(BOOL)
    few.add_incoming(BOOL(1), entry)
    few.add_incoming(lacking, ask)
    replaced = builder.and_(few, builder.icmp_signed("!=", serial, INT64(0)))
    jobs = builder.select(replaced, serial, count)
    skipped = builder.select(replaced, count, INT64(0))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.atomic_rmw("add", field(builder, phase, PHASE, "next"), INT64(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", index, jobs), body, done)
    builder.position_at_end(body)
    builder.call(job, [task, following(builder, phase, PHASE, builder.add(index, skipped))])
    builder.branch(head)
    builder.position_at_end(done)
    builder.ret_void()


def define_run(function: ir.Function, share: ir.Function) -> None:
    program = function.args[0]
    builder = ir.IRBuilder(function.append_basic_block())
    team, threads, count = fields(builder, program, PROGRAM)
    with counted(builder, count) as index:
        phase = following(builder, program, PROGRAM, index)
        builder.store(INT64(0), field(builder, phase, PHASE, "next"))
        shared = builder.load(field(builder, phase, PHASE, "shared"))
        with builder.if_else(builder.icmp_signed("!=", builder.mul(shared, team), INT64(0))) as (several, alone):
            with several:
                # void GOMP_parallel(void (*fn)(void *), void *data, unsigned num_threads, unsigned flags)
                kind = ir.FunctionType(VOID, [ENTRY.as_pointer(), INT64, INT32, INT32])
                start = builder.inttoptr(team, kind.as_pointer())
                builder.call(start, [share, phase, builder.trunc(threads, INT32), INT32(0)])
            with alone:
                builder.call(share, [phase])
    builder.ret_void()
