"""How a kernel receives its arguments: one address, of a record of int64 fields.

A record keeps the cost of a call at that of one argument, and lets a call's records be made in one go (see `recipe`).
"""

from collections.abc import Mapping
from typing import Any

# Names in machine code: a call, the run of a program, the sharing of one phase, one job.
START, RUN, SHARE, JOB = "rnnfast_start", "rnnfast_run", "rnnfast_share", "rnnfast_job"


class Record:
    """A list of field names."""

    def __init__(self, *names: str):
        self.names = names

    def order(self, fields: Mapping[str, Any]) -> list:
        """The fields in order; those not given are 0."""
        unknown = fields.keys() - set(self.names)
        if unknown:
            raise TypeError(f"no such fields: {sorted(unknown)}")
        return [fields.get(name, 0) for name in self.names]

    def reader(self):
        """The function that turns a record's address into the record."""
        import numpy as np
        from numba import from_dtype, types
        from numba.extending import intrinsic

        kind = from_dtype(np.dtype([(name, np.int64) for name in self.names]))

        @intrinsic
        def record_at(typing, address):
            def lower(context, builder, sig, args):
                return builder.inttoptr(args[0], context.get_value_type(kind))

            return kind(types.int64), lower

        return record_at


# A call: fill in `records[i] = values[i] + bases[which[i]]` for `count` integers, then run the program at the address
# `program`, unless that is 0. The bases follow.
CALL = Record("values", "which", "count", "records", "program")
# A phase of a call: the task, whether a team shares it, the next job, and how many there are; the jobs' addresses
# follow. With `serial`, all jobs must run at the same time; `team_size` is the address of omp_get_num_threads, and
# where that says that the team is too small, the `serial` jobs that follow the others do their work instead.
PHASE = Record("task", "shared", "next", "count", "serial", "team_size")
# A program: the address of GOMP_parallel or 0, threads of the team, and how many phases; the phases' addresses follow.
PROGRAM = Record("team", "threads", "count")
# Where a signal is: its address, and the bytes from one step, row and unit to the next, each 0 where all have the same.
SIGNAL = Record("address", "step", "row", "unit")
