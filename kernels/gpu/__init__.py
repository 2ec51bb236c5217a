"""Large Triton kernels and their launches."""
