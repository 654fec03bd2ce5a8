"""Training with transformers' Trainer: data, tokenizers, runs that resume exactly, checkpoints that appear whole."""

from loglinear.data.corpus import Corpus, load_corpus
from loglinear.data.tokenizer import load_tokenizer
from loglinear.models import ByteTokenizer
from loglinear.runs.checkpoints import resolve
from loglinear.runs.loading import load_checkpoint, load_model
from loglinear.training.train import TrainingResult, train

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "TrainingResult",
    "load_checkpoint",
    "load_corpus",
    "load_model",
    "load_tokenizer",
    "resolve",
    "train",
]
