"""MervTrainer: transformers' Trainer with what is special of MERV."""

from __future__ import annotations

from collections import Counter
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from merv_fast.training.collator import SKIPPED
from merv_fast.training.stages import Stage

__all__ = ["MervTrainer"]


class MervTrainer(Trainer):
    """Keeps frozen encoders in evaluation mode, counts what was skipped, and decays what the reference decays.

    The loss of a step is the mean over all its learned tokens, of every process and every batch of the step; the
    reference takes the mean of the batches' means.

    Args:
        stage: which parts learn.
        kwargs: as for ``Trainer``; ``model`` is a ``MervForConditionalGeneration``.
    """

    def __init__(self, *, stage: Stage, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stage = stage
        self.bare = self.model
        self.skipped: Counter[str] = Counter()
        # It prints; the log is in the report and in each checkpoint.
        self.remove_callback(PrinterCallback)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in ``Trainer``."""
        self.skipped.update(inputs.pop(SKIPPED, ()))
        # Trainer has just put every part in training mode.
        self.stage.train(self.bare)
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Tensors of two dimensions or more, as in the reference; transformers goes by their names."""
        return [name for name, tensor in model.named_parameters() if tensor.ndim > 1 and not name.endswith(".bias")]

    def all_skipped(self) -> dict[str, int]:
        """Why entries were skipped, by all processes, and how often."""
        return dict(sum(map(Counter, gather_object([dict(self.skipped)])), Counter()))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """As in ``Trainer``; ``group_by_length`` goes by words instead of decoding every video to find its ids."""
        data = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(together, lengths=data.lengths)
