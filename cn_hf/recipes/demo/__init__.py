"""The ``cn-hf demo``."""
