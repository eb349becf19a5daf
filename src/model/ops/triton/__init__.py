"""Kernels for GPUs in Triton; `fast` is the door to them."""
