"""The benchmark suite: recurrent layers across sizes, against every peer, checked before they are timed.

    python -m benchmarks --help

One way through the files: `questions` lists what is asked, as `cases`; `driver` sends each case to a `worker` process;
there `run` builds the same `workload` for every contender in `contenders/`, checks it against the `oracle`, and has
`measure` and `memory` take the numbers; `store` keeps them. `tables`, `plot`, `report`, `marks`, `compare` and `readme`
only read what is stored.
"""
