"""Which models patching works for, swept and tabulated. Run as ``python scripts/coverage``."""
