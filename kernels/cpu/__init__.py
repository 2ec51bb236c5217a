"""CPU kernels for training: bindings of the C++ extension as differentiable functions."""
