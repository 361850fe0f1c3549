"""Eq. 8 as one operator in each direction: formulas, the operators, and kernels for a CPU and for CUDA."""
