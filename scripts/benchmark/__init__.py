"""The speed of context normalization against what it replaces. Run as ``python scripts/benchmark``."""
