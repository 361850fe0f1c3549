"""How fast context normalization is, against what it replaces. Run as ``python scripts/benchmark``."""
