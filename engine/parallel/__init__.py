"""Tensor and expert parallelism: collectives with autograd, sharded layers."""
