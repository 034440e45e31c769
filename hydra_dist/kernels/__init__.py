"""Triton kernels and their launchers, one operation per file; each has a plain PyTorch reference elsewhere."""
