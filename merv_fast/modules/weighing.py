"""Fusions that are a weighted sum of the encoders."""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Self

import torch
from torch import Tensor, nn

from merv_fast import ops
from merv_fast.modules.joining import Fusion
from merv_fast.ops._autocast import without_autocast
from merv_fast.remembered import Remembered

__all__ = ["CrossAttentionFusion", "ScalarFusion", "WeighingFusion", "convert_fusion_state_dict"]

# The most encoders that the ops take.
MOST_ENCODERS = 8


class WeighingFusion(Fusion):
    """``O = sum_e w_e V_e`` with ``w = softmax_e(mean_s(V_e) . query + bias_e)`` for a folded query and bias.

    A ``V_e`` of a single token is repeated to the length of the others. The weights are float32, float64 for
    float64 values.

    Without gradients the folded query and bias are kept until a parameter changes, as folding reads all of
    them. PyTorch does not count writes through ``parameter.data``: after those, call ``eval()`` or ``train()``.
    """

    op = "fuse_encoders"

    def __init__(self, encoders: int) -> None:
        if encoders > MOST_ENCODERS:
            raise ValueError(f"{type(self).__name__}: encoders must be at most {MOST_ENCODERS}, got {encoders}")
        super().__init__(encoders)

    def fold(self) -> tuple[Tensor, Tensor]:
        """``query [D]`` and ``bias [E]`` of the present parameters, differentiable."""
        raise NotImplementedError

    def folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`fold` in ``dtype``, which autocast does not touch; the same tensors as long as nothing has changed."""
        parameters = list(self.parameters())
        needs_grad = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        if needs_grad or torch.compiler.is_compiling():
            return self._fold_in(dtype)
        return _FOLDED.get(self, parameters, lambda: self._fold_to_keep(dtype), tag=dtype)

    def _fold_to_keep(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # What is made in inference mode has no version by which the op could know it again.
        with torch.inference_mode(False), torch.no_grad():
            return self._fold_in(dtype)

    def _fold_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with without_autocast(next(self.parameters())):
            query, bias = self.fold()
        return query.to(dtype), bias.to(dtype)

    def train(self, mode: bool = True) -> Self:
        """As in torch.nn.Module; what was kept of the parameters is made again."""
        _FOLDED.forget(self)
        return super().train(mode)

    def output_tokens(self, tokens_per_encoder: Sequence[int]) -> int:
        """The common S_e, those of a single token aside."""
        self.check_encoders(tokens_per_encoder)
        lengths = set(tokens_per_encoder) - {1}
        if len(lengths) > 1:
            raise ValueError(
                f"{type(self).__name__}: tokens_per_encoder must be equal or 1, got {list(tokens_per_encoder)}"
            )
        return lengths.pop() if lengths else 1

    def forward(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``values``, E tensors ``[B, S, D]`` or ``[B, 1, D]``, to ``[B, S, D]`` and ``[B, E]``."""
        self.output_tokens([value.shape[1] for value in values])
        query, bias = self.folded(values[0].dtype)
        return ops.fuse_encoders(list(values), query, bias)


_FOLDED = Remembered()
"""What `folded` keeps of each module; outside of them, so that they can be copied and pickled."""


class CrossAttentionFusion(WeighingFusion):
    """One learned query attends to the mean token of each encoder; its weights mix the encoders.

    ``score_e = q . k_e / sqrt(query_width)`` with ``q = q_proj(Q)`` and ``k_e = k_proj(mean_s(V_e) + pe_e)``
    (MERV, arXiv 2501.01426). The reference keeps a whole ``nn.MultiheadAttention`` and discards its output;
    ``convert_fusion_state_dict`` drops the value and output projections that never mattered.
    """

    def __init__(
        self, encoders: int, llm_width: int, query_width: int = 3072, positional_embedding: bool = False
    ) -> None:
        super().__init__(encoders)
        self.Q = nn.Parameter(torch.empty(1, query_width))
        self.q_proj = nn.Linear(query_width, query_width)
        self.k_proj = nn.Linear(llm_width, query_width)
        self.pe = nn.Parameter(torch.empty(encoders, llm_width)) if positional_embedding else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The start of ``nn.MultiheadAttention``: Xavier uniform weights, zero biases."""
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)

    def fold(self) -> tuple[Tensor, Tensor]:
        """``query = k_proj^T q / sqrt(query_width)``, ``bias_e = q . (k_bias + k_proj pe_e) / sqrt(...)``."""
        q = self.q_proj(self.Q)[0] / sqrt(self.Q.shape[1])
        query = q @ self.k_proj.weight
        bias = (q @ self.k_proj.bias).expand(self.encoders)
        return query, bias if self.pe is None else bias + self.pe @ query


class ScalarFusion(WeighingFusion):
    """Softmax over one learned number an encoder: attention whose query is zero.

    The reference has the parameters (always four) but its released model refuses to run them.
    """

    def __init__(self, encoders: int, llm_width: int) -> None:
        super().__init__(encoders)
        self.llm_width = llm_width
        self.scalar = nn.Parameter(torch.randn(encoders))

    def fold(self) -> tuple[Tensor, Tensor]:
        """A zero query and the scalars."""
        return self.scalar.new_zeros(self.llm_width), self.scalar


def convert_fusion_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's fusion weights under our names; other fusions and our own names pass unchanged.

    | reference | ours |
    |---|---|
    | ``attention.q_proj_weight``, or the first third of ``attention.in_proj_weight`` | ``q_proj.weight`` |
    | ``attention.k_proj_weight``, or the second third of ``attention.in_proj_weight`` | ``k_proj.weight`` |
    | ``attention.in_proj_bias``, its first and second third | ``q_proj.bias``, ``k_proj.bias`` |
    | ``attention.v_proj_weight``, ``attention.out_proj.*`` and the last thirds | dropped, never used |

    ``nn.MultiheadAttention`` packs its three weights into one where the query and the LLM are equally wide.
    """
    converted = {}
    for name, tensor in tensors.items():
        match name.removeprefix("attention."):
            case "q_proj_weight":
                converted["q_proj.weight"] = tensor
            case "k_proj_weight":
                converted["k_proj.weight"] = tensor
            case "in_proj_weight":
                converted["q_proj.weight"], converted["k_proj.weight"], _ = tensor.chunk(3)
            case "in_proj_bias":
                converted["q_proj.bias"], converted["k_proj.bias"], _ = tensor.chunk(3)
            case "v_proj_weight" | "out_proj.weight" | "out_proj.bias":
                continue
            case _:
                converted[name] = tensor
    return converted
