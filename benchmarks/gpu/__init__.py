"""Checks and measurements on a GPU: `python -m benchmarks.gpu first`, then `second`. See `__main__`.

`stages` run layers and keep rows, with what `layers` and `probe` offer; `processes` ends them in time; `cache` brings
kernels that were compiled elsewhere; `report` tells what was found.
"""
