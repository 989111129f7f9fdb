"""The loss in the training loops of others: a module a framework, which alone imports it (``docs/integrations.md``)."""
