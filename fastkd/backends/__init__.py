"""Backends: each implements the row contract (``fastkd._dispatch.Backend``) and nothing else."""
