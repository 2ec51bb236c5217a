"""Triton kernels too large for their op's file, and their launches."""
