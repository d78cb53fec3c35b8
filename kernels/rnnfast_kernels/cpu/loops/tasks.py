"""The one entry point of the compiled code, and what it can be asked to do.

One, because what several tasks share is then compiled once. Second derivatives, which few programs take, have a file of
machine code of their own, and so an entry point of their own.
"""

# ruff: noqa: F821

PACK_WEIGHT, FORWARD, BACKWARD, ROWS_PRODUCT, OUTER_PRODUCT, JVP, HVP = range(7)


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


def run_inference_job(task, address):
    """Do the one task that layers with packed weights have."""
    layer_forward(address)


def run_second_job(task, address):
    """Do a task of the second derivative."""
    if task == PACK_WEIGHT:
        pack(address)
    elif task == JVP:
        layer_jvp(address)
    elif task == HVP:
        layer_hvp(address)
    elif task == ROWS_PRODUCT:
        rows_product(address)
    else:
        outer_product(address)


# By the number of derivatives.
ENTRIES = {0: run_inference_job, 1: run_job, 2: run_second_job}
