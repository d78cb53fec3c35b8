"""The kernels compile for GPUs that are not here, and the report of what they take can be trusted."""

import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton", minversion="3.5")

from conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from rnnfast_kernels.gpu import aot, plan


def case(target, cell="gru", H=100, backward=True, ragged=True):
    dtype, device = "bfloat16", aot.TARGETS[target][1]
    return aot.Case(target, plan.Problem(cell, H, 16, 1, dtype, "ieee", backward, device), ragged)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_kernel_compiles_without_its_gpu(target):
    usage = aot.compile_launch(target, aot.describe(case(target)))
    assert 0 < usage.registers <= 512
    assert usage.spilled == 0
    assert 0 < usage.shared <= aot.TARGETS[target][1].shared


def test_a_spill_is_reported():
    with plan.override(lambda problem: replace(plan.resident(problem, 16, 4), registers=40)):
        row, problem = aot.report(case("sm_90", "lstm", 64))
    assert " 40 registers" in row
    assert problem.endswith("it spills in a loop")


def test_too_much_shared_memory_is_reported():
    with plan.override(lambda problem: plan.resident(problem, 16, 8)):
        _, problem = aot.report(case("sm_120", "lstm", 128))
    assert problem.endswith("101376 bytes of shared memory at most")


def test_a_kernel_that_does_not_compile_is_reported():
    with plan.override(lambda problem: plan.Plan("resident", 16, 100, 4, "ieee", 100, 1, 1, programs=1)):
        _, problem = aot.report(case("sm_90"))
    assert "Error" in problem


def test_what_is_spilled_around_the_loop_is_told_from_what_is_spilled_in_it():
    code = "/*0010*/ STL [R1], R4 ;\n/*0020*/ LDL R4, [R1] ;\n/*0030*/ @P0 BRA 0x20 ;\n/*0040*/ LDL R5, [R1] ;"
    assert aot.cuda_listing(code).in_loops("STL|LDL") == 1
    assert aot.cuda_listing(code.replace("BRA 0x20", "BRA 0x40")).in_loops("STL|LDL") == 3
    around = ".LBB0_1:\n s_barrier\n s_cbranch_scc0 .LBB0_1\n v_mov v1 ; 4-byte Folded Spill\n"
    counts = ".vgpr_count: 84\n .vgpr_spill_count: 3\n"
    assert aot.amd_usage(around + counts) == (84, 12, 0, 3, 1, 0, 0)
    reload = around.replace("s_barrier", "v_mov v1 ; 4-byte Folded Reload")
    assert aot.amd_usage(reload + counts) == (84, 12, 1, 3, 0, 0, 0)


def test_a_step_is_the_longest_loop():
    code = "/*0010*/ NOP ;\n/*0020*/ BAR.SYNC 0x0 ;\n/*0030*/ @P0 BRA 0x30 ;\n/*0040*/ @P0 BRA 0x20 ;\n/*0050*/ EXIT ;"
    assert aot.loop_usage(aot.cuda_listing(code), "STL", "BAR") == (0, 3, 1)


def test_registers_are_read_from_amd_assembly():
    with pytest.raises(RuntimeError, match="vgpr_count"):
        aot.amd_usage("nothing")


def test_the_command_names_its_targets():
    result = subprocess.run(
        [sys.executable, "-m", "rnnfast_kernels.gpu.aot", "--help"], capture_output=True, text=True, check=True
    )
    assert all(target in result.stdout for target in aot.TARGETS)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_representative_set_compiles():
    """Every cell and precision, forward and backward, rows of one length and of several, for one target."""
    command = [sys.executable, "-m", "rnnfast_kernels.gpu.aot", "--quick", "--target", "sm_90", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
