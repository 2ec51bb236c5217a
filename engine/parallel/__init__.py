"""Tensor and expert parallelism: collectives and sharded layers."""
