"""Model definitions (Flax nnx); they import kernels and config only."""
