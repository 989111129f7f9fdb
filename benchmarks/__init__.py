"""The benchmarks, installed as ``fastkd.bench``: ``python -m fastkd bench``, or ``pytest benchmarks``."""
