"""The contenders. One module each, with a list of what it provides; a line below makes it known."""

from fastkd.bench.providers import copy, eager, fastkd, fla, liger, products, quack, trl

MODULES = (copy, products, eager, fastkd, liger, trl, quack, fla)
PROVIDERS = tuple(provider for module in MODULES for provider in module.PROVIDERS)
