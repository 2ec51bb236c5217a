"""One file an op: an eager reference, a fused Triton twin, and the `Op` record that ties them."""
