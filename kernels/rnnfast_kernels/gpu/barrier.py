"""The barrier between the programs that share one recurrence.

Programs that wait for one another share a counter that only grows: those of a group, or in a grid those of a line and
those of a column. A program arrives once per step and waits until all arrivals are counted. It spins, so all programs
of a launch must be on the device at once: the launch is cooperative, which the driver refuses where they do not fit.
"""

import triton
import triton.language as tl

# One counter to a cache line of 128 bytes, so that groups do not disturb one another.
COUNTER_STRIDE = tl.constexpr(32)
# Counters are int32: a group of M programs counts M arrivals in each of T steps and M before the first, so that
# (T + 1) * M may be this much. A longer sequence runs step by step.
MOST_ARRIVALS = 2**31 - 1


@triton.jit
def arrive(p_counter):
    """Publish what this program has written: to its own threads, then, by the release, to every program that waits."""
    tl.debug_barrier()
    tl.atomic_add(p_counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(p_counter, arrivals):
    """Return once the counter has reached `arrivals`; what was published before is then visible to all threads."""
    while tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()
