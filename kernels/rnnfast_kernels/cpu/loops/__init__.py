"""What runs in a job: packing, the forward and backward loops, tangents, gradients of weights; over any cell.

Plain Python functions over names that `runtime.build` binds. The order of every sum is here and in `ir.tile`.
"""
