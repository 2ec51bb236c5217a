"""Many processes, one run: mesh, gradient reduction, sharded state and checkpoints."""
