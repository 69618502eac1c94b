"""Attention and contrastive-loss kernels, installed as `pyvdl.kernels`; they import jax only."""
