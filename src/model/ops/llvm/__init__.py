"""Kernels for CPUs in LLVM's language, compiled by llvmlite; `fast` is the door to them."""
