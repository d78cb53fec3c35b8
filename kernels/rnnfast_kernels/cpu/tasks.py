"""The one entry point of the compiled code, and what it can be asked to do.

One, because what several tasks share is then compiled once.
"""

# ruff: noqa: F821

PACK_WEIGHT, FORWARD, BACKWARD, ROWS_PRODUCT, OUTER_PRODUCT = range(5)


def run_job(task, address):
    """Do a task; `address` is that of its record."""
    if task == PACK_WEIGHT:
        pack(address)
    elif task == FORWARD:
        layer_forward(address)
    elif task == BACKWARD:
        layer_backward(address)
    elif task == ROWS_PRODUCT:
        rows_product(address)
    else:
        outer_product(address)
