"""Kernel sources: one folder an op, one file a device. Installed as `megatron_lite._csrc` for the Triton kernels."""
