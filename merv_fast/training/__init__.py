"""Training on transformers' Trainer: `train`, and its parts for loops of one's own."""

from merv_fast.training.collator import Collator
from merv_fast.training.data import Entry, Turn, read_entries
from merv_fast.training.dataset import Sample, TrainingDataset
from merv_fast.training.features import StoredFeatures, encode_videos
from merv_fast.training.run import TrainingReport, train
from merv_fast.training.stages import STAGES, Stage, training_arguments
from merv_fast.training.tokens import EntryError, Tokens, caption_tokens, conversation_tokens
from merv_fast.training.trainer import MervTrainer

__all__ = [
    "STAGES",
    "Collator",
    "Entry",
    "EntryError",
    "MervTrainer",
    "Sample",
    "Stage",
    "StoredFeatures",
    "Tokens",
    "TrainingDataset",
    "TrainingReport",
    "Turn",
    "caption_tokens",
    "conversation_tokens",
    "encode_videos",
    "read_entries",
    "train",
    "training_arguments",
]
