"""How a call is cut up: slices of the batch, chunks of steps, scratch memory, recorded as phases of jobs.

Nothing here changes a result.
"""
