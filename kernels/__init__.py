"""Attention and contrastive-loss kernels, installed as `pyvdl.kernels`; they import jax only.

Every op has a plain definition in `reference.py` and takes `implementation=`: None picks the best for the platform the
program is lowered for, a name runs that implementation or raises.
"""

from .attention import ATTENTION_RESIDUALS, attention, space_time_attention
from .contrastive import contrastive_loss

__all__ = ["ATTENTION_RESIDUALS", "attention", "contrastive_loss", "space_time_attention"]
