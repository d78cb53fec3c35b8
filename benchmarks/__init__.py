"""The benchmark suite: recurrent layers across sizes, against every peer, checked before they are timed.

    python -m benchmarks --help

One way through the files: `questions` lists what is asked, as `cases`; `session` sends each case to a `worker` process;
in it `measure` builds the same `workload` for every contender in `contenders/`, checks it against the `oracle`, and
takes the numbers; `store` keeps them. `report` (text), `page` (HTML), `readme` and `compare` only read what is stored.
`gpu/` is the command for a machine with a GPU.
"""
