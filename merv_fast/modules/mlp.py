"""The MLP that takes an encoder's width to the LLM's."""

from itertools import pairwise

from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """Linear layers with exact (erf) GELU between them, ``[..., in_width] -> [..., out_width]``.

    ``linear`` has one layer, ``gelu-mlp`` two, ``fused-gelu-mlp`` three (hidden widths ``4 * in_width`` and
    ``out_width``), ``none`` no layer at all, so its widths must agree (``ValueError``). State-dict names are
    the reference's: ``projector.weight`` for one layer, ``projector.0.weight``, ``projector.2.weight`` ...
    for more.
    """

    def __init__(self, mlp: str, in_width: int, out_width: int) -> None:
        super().__init__()
        hidden = {
            "none": [],
            "linear": [out_width],
            "gelu-mlp": [out_width, out_width],
            "fused-gelu-mlp": [4 * in_width, out_width, out_width],
        }
        if mlp not in hidden:
            raise ValueError(f"MLP: mlp must be one of {', '.join(hidden)}, got {mlp!r}")
        if mlp == "none" and in_width != out_width:
            raise ValueError(f"MLP: in_width must be out_width ({out_width}) without layers, got {in_width}")
        layers: list[nn.Module] = []
        for width, next_width in pairwise([in_width, *hidden[mlp]]):
            layers += [nn.Linear(width, next_width), nn.GELU()]
        layers = layers[:-1]
        self.projector = layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers, first to last."""
        return [module for module in self.projector.modules() if isinstance(module, nn.Linear)]

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_width] -> [..., out_width]``."""
        return self.projector(x)
