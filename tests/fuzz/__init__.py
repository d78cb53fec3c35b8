"""A fuzzer: options of a layer drawn together, and sequences of actions; `python -m tests.fuzz --help` runs it."""
