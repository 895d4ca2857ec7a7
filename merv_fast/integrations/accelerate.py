"""accelerate: a live model of somebody else's, with our tail, encoders and streams in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import nn

from merv_fast.integrations.swaps.encoders import find_encoder, holder_of
from merv_fast.integrations.swaps.findings import Finding, Refusal, Swap, install, remove, swaps_of
from merv_fast.integrations.swaps.fusions import find_fusion
from merv_fast.integrations.swaps.llava import find_llava
from merv_fast.integrations.swaps.projectors import find_projector
from merv_fast.integrations.swaps.shared_vit import unpack
from merv_fast.integrations.swaps.side_by_side import find_lanes
from merv_fast.integrations.swaps.tails import find_tail
from merv_fast.models import MervForConditionalGeneration, MervModel, MervVideoModel
from merv_fast.models.explanation import Choice, Explanation
from merv_fast.models.explanation import explain as explain_ours

__all__ = ["accelerate", "explain", "restore"]

logger = logging.getLogger("merv_fast")

Model = TypeVar("Model", bound=nn.Module)

NOT_OURS = "no projector, fusion or encoder of a known kind"


def accelerate(model: Model, *, strict: bool = False) -> Model:
    """Let the parts of ``model`` that are known run ours, with the same weights, in place.

    Parts are known by their structure, whatever package they are from: the reference's averaging projectors, its
    fusions that weigh encoders, the two as one op where a model has ``projectors`` and a ``feature_fusion``; LLaVA's
    ``mm_projector`` and ``get_2dPool``; timm's vision transformers as MERV and prismatic use them, transformers'
    ``VivitModel``, the reference's LanguageBind backbone; on a GPU ``video_backbones``, and prismatic's two
    featurizers, side by side. Parameters stay those of the model: it is saved, moved, cast and trained as before, and
    an encoder to whose weights a gradient is wanted runs its own code. Outputs are those of before up to rounding.

    Args:
        model: any module; usually a ``MERV`` of princetonvisualai/merv.
        strict: whether to raise if a part of a known kind must be left as it is, or there is none.

    Returns:
        ``model``. `explain` tells of each part what runs and why; `restore` gives back what was there.

    Raises:
        ValueError: under ``strict``, with the reason for every part; nothing is changed then. Or the model is
            accelerated already.

    Example:
        >>> import torch
        >>> from merv_fast import accelerate, explain
        >>> class Projector(torch.nn.Module):  # as the reference has it
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.output_frames, self.avg_pool = 8, torch.nn.AdaptiveAvgPool2d((4, 4))
        ...         self.projector = torch.nn.Linear(16, 32)
        >>> projector = accelerate(Projector())
        >>> projector(torch.zeros(1, 8, 64, 16)).shape
        torch.Size([1, 128, 32])
        >>> print(explain(projector))
        part  runs          where         why
        (it)  pool_project  cpu, float32  averages to 4x4 tokens, 1 linear layer(s)
    """
    if any(swaps_of(module) for module in model.modules()):
        raise ValueError("accelerate: model must not be accelerated yet; call restore first")
    found = findings(model)
    refused = [f"{name or '(it)'}: {each.why}" for name, _, each in found if isinstance(each, Refusal)]
    swaps = [(module, each) for _, module, each in found if isinstance(each, Swap)]
    if strict and (refused or not swaps):
        raise ValueError(f"accelerate: every part must be one that can be taken, got {'; '.join(refused) or NOT_OURS}")
    for module, swap in swaps:
        install(module, swap)
    # A lane runs what the encoder in it runs now.
    for parent in list(model.modules()):
        for module, swap in find_lanes(parent).items():
            install(module, swap)
    for line in refused or ([] if swaps else [NOT_OURS]):
        logger.warning("accelerate: left as it is: %s", line)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, exactly: every method is the one that was there, every parameter has memory of its own.

    Raises:
        ValueError: the model is not accelerated.
    """
    holders = [holder for module in model.modules() if (holder := holder_of(module)) is not None]
    if not sum(remove(module) for module in model.modules()):
        raise ValueError("restore: model must be accelerated, got one that is not")
    for holder in holders:
        unpack(holder)
    return model


def findings(model: nn.Module) -> list[tuple[str, nn.Module, Finding]]:
    """Every part of a known kind by its name, each once."""
    together: dict[nn.Module, Finding] = {}
    for module in model.modules():
        together |= find_tail(module) | find_llava(module)
    found = []
    for name, module in model.named_modules():
        finding = together.get(module) or find_projector(module) or find_fusion(module) or find_encoder(module)
        if finding is not None:
            found.append((name, module, finding))
    return found


def explain(model: nn.Module) -> Explanation:
    """What runs where and why, for each part of a model of ours, or of one that was accelerated or might be.

    Of somebody else's model a part in which nothing is known is one line with all that it holds.

    Example:
        >>> import merv_fast
        >>> choices = merv_fast.explain(merv_fast.load_vid("merv-tiny"))
        >>> choices[0].part
        'prepare'
    """
    if isinstance(model, (MervModel, MervForConditionalGeneration, MervVideoModel)):
        return explain_ours(model)
    known = {module: each for _, module, each in findings(model)}
    return Explanation(lines(model, "", known))


def lines(module: nn.Module, name: str, known: Mapping[nn.Module, Finding]) -> Iterator[Choice]:
    """The lines of ``module`` and what it holds."""
    part, finding, running = name or "(it)", known.get(module), swaps_of(module)
    for swap in running:
        yield Choice(part, swap.runs, where(module), swap.why)
    if isinstance(finding, Refusal):
        yield Choice(part, "as before", where(module), f"refused: {finding.why}")
    elif finding is not None and not running:
        yield Choice(part, "as before", where(module), f"accelerate would run {finding.runs}: {finding.why}")
    if any(part in known or swaps_of(part) for child in module.children() for part in child.modules()):
        for key, child in module.named_children():
            yield from lines(child, f"{name}.{key}" if name else key, known)
    elif finding is None and not running:
        yield Choice(part, "as before", where(module), NOT_OURS)


def where(module: nn.Module) -> str:
    """Device and dtype."""
    weight = next(module.parameters(), None)
    return "" if weight is None else f"{weight.device}, {str(weight.dtype).removeprefix('torch.')}"
