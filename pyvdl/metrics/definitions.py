"""What each metric is, in the words that score files carry: figures by other definitions do not compare."""

from typing import Final

_TOKENS = "tokens as by Stanford's PTBTokenizer 3.4.1 (-lowerCase -preserveLines, without marks)"
_RANKED = "cosine, or the similarity given; ranks count from 1; of several right candidates the best"

DEFINITIONS: Final = {
    "CIDEr-D": f"pycocoevalcap's Cider x100: n 1 to 4, sigma 6, clipped, frequencies of the references; {_TOKENS}",
    "BLEU": f"pycocoevalcap's Bleu x100: of the whole set, closest reference; {_TOKENS}",
    "ROUGE-L": f"pycocoevalcap's Rouge x100: beta 1.2; {_TOKENS}",
    "exact match": "equal strings, or any of several answers; and the same after lower-casing and stripping",
    "WUPS": "NExT-OE's, at 0 and 0.9, x100: first synsets of WordNet 3.0, DB and DC by equality, best of the answers; "
    "words prepared by pyvdl's own tokenizer, tags, lemmas and Porter stems, and NExT-OE's stop list",
    "multiple choice": "share of questions whose right option has the highest log-likelihood, its end included",
    "retrieval": f"{_RANKED}; median rank: of an even number the mean of the middle two; ties: strict counts equals "
    "ahead of the right one (headline), loose behind it, expected averages over their orders",
    "zero-shot": f"{_RANKED}; a class is the mean of its templates' normalised embeddings, normalised; ties: strict",
}
