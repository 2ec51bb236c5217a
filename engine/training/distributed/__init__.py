"""Distributed training: process mesh, gradient reduction, sharded state, distributed checkpoints."""
