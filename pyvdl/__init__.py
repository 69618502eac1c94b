"""pyvdl: adapt an image vision-language model to video, caption clips with it, train a video-text encoder on them."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .video import (
        ClipBatch,
        ClipLoader,
        ClipRequest,
        DecodeError,
        FileSlice,
        FrameBatch,
        Limits,
        VideoDecoder,
        sample_clip,
    )

__version__ = "0.1.0"

__all__ = [
    "ClipBatch",
    "ClipLoader",
    "ClipRequest",
    "DecodeError",
    "FileSlice",
    "FrameBatch",
    "Limits",
    "VideoDecoder",
    "__version__",
    "sample_clip",
]


def __getattr__(name: str) -> Any:
    """Loads the decoder's names and the modules when first used: importing pyvdl does no work."""
    if name in __all__:
        from . import video

        return getattr(video, name)
    if not name.startswith("_") and importlib.util.find_spec(f"pyvdl.{name}") is not None:
        return importlib.import_module(f"pyvdl.{name}")
    raise AttributeError(f"module 'pyvdl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
