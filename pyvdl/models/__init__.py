"""Model definitions (Flax nnx); they import kernels and config only."""

from .dual_encoder import DualEncoder, inflate
from .t5 import T5
from .vit import ViT
from .vlm import VLM

__all__ = ["T5", "VLM", "DualEncoder", "ViT", "inflate"]
