"""Model definitions (Flax nnx); they import kernels and config only."""

from .dual_encoder import DualEncoder, inflate
from .gemma import Gemma
from .t5 import T5
from .vit import ViT
from .vlm import VLM, assemble
from .weights import load_pretrained, save_pretrained

__all__ = ["T5", "VLM", "DualEncoder", "Gemma", "ViT", "assemble", "inflate", "load_pretrained", "save_pretrained"]
