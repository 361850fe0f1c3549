"""Accelerate loops that train networks with contexts, and the runs built on them."""
