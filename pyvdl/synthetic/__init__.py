"""A labelled video corpus made from nothing: scenes, drawn, told in words and encoded as real files."""

from pyvdl.synthetic.corpus import Corpus, make_corpus
from pyvdl.synthetic.words import ALT_TEXT_NOISE

__all__ = ["ALT_TEXT_NOISE", "Corpus", "make_corpus"]
