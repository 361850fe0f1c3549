"""Train a classifier with contexts, beside a baseline without, and evaluate it honestly."""
