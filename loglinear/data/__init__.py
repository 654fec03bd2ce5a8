"""Text to rows: sources of documents, tokenizers, corpora, packing, and documents of needles."""

from loglinear.data.corpus import Corpus, load_corpus
from loglinear.data.tokenizer import load_tokenizer

__all__ = ["Corpus", "load_corpus", "load_tokenizer"]
