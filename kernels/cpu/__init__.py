"""Bindings of the C++ training kernels as differentiable functions."""
