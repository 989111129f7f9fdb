"""The contenders. One module each, with a list of what it provides; a line below makes it known."""

from fastkd.bench.providers import copy, eager, fastkd, fla, liger, quack

PROVIDERS = (*copy.PROVIDERS, *eager.PROVIDERS, *fastkd.PROVIDERS, *liger.PROVIDERS, *quack.PROVIDERS, *fla.PROVIDERS)
