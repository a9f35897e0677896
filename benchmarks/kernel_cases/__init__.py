"""The cases of benchmarks/kernels.py: one module for each op."""
