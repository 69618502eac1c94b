"""pyvdl: adapt an image vision-language model to video, caption clips with it, train a video-text encoder on the captions."""

__version__ = "0.1.0"
