"""The models that patching works for, swept and tabulated. Run as ``python scripts/coverage``."""
