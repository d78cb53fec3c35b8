"""What is compiled for a job: what its entry point calls, directly or not, in whatever order functions are listed."""

import itertools

from rnnfast_kernels.cpu.loops import steps
from rnnfast_kernels.cpu.loops.tasks import ENTRIES
from rnnfast_kernels.cpu.runtime.build import LOOPS, by_name, compile_into, reached

# ruff: noqa: F821


def outer(x):
    return middle(x) + inner(x) + KNOWN


def middle(x):
    return inner(x) * 2


def inner(x):
    return x


def apart(x):
    return x


def test_functions_are_compiled_after_those_that_they_call():
    for order in itertools.permutations((outer, middle, inner, apart)):
        functions, namespace = by_name(order), {"SALT": "", "KNOWN": 1}
        assert reached(outer, functions) == {"middle", "inner", "KNOWN"}
        compile_into(namespace, functions, ["outer"])
        assert namespace.keys() == {"SALT", "KNOWN", "outer", "middle", "inner"}
        for caller, callee in (("outer", "middle"), ("outer", "inner"), ("middle", "inner")):
            assert namespace[caller].py_func.__globals__[callee] is namespace[callee]


def test_jobs_reach_the_loops_of_their_tasks():
    without_backward = LOOPS | {"run_turn": steps.run_forward_turn}
    loops = {"pack", "layer_forward", "layer_backward", "layer_jvp", "layer_hvp", "rows_product", "outer_product"}
    found = [reached(ENTRIES[n], LOOPS if n else without_backward) & loops for n in sorted(ENTRIES)]
    training = {"pack", "layer_forward", "layer_backward", "rows_product", "outer_product"}
    assert found == [{"layer_forward"}, training, loops - {"layer_forward", "layer_backward"}]
    assert "cell_backward" not in reached(ENTRIES[0], without_backward)
