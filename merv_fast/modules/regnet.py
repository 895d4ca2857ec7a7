"""The RegNet stage of the convolutional projector, on channels-last maps."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RegNetStage"]

SQUEEZE_RATIO = 0.25


class RegNetStage(nn.Sequential):
    """``depth`` RegNet bottlenecks at stride 1, ``[B, in_width, H, W] -> [B, out_width, H, W]``.

    Designing Network Design Spaces (arXiv 2003.13678), with the choices of timm's ``RegStage`` that
    Honeybee's C-Abstractor (arXiv 2312.06742) and the reference make: SiLU, LayerNorm over channels (eps
    1e-5), bottleneck ratio 1, one channel a group. State-dict names are timm's: ``b1.conv1.conv.weight`` ...
    """

    def __init__(self, in_width: int, out_width: int, depth: int) -> None:
        super().__init__()
        for index in range(depth):
            self.add_module(f"b{index + 1}", Bottleneck(in_width if index == 0 else out_width, out_width))


class Bottleneck(nn.Module):
    """1x1, depthwise 3x3, squeeze and excitation, 1x1; a projected shortcut where the width changes."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.conv1 = NormedConv(in_width, out_width, 1, activate=True)
        self.conv2 = NormedConv(out_width, out_width, 3, activate=True, groups=out_width)
        # The squeeze follows the width of the block's input, not of the maps it gates.
        self.se = SqueezeExcitation(out_width, round(in_width * SQUEEZE_RATIO))
        self.conv3 = NormedConv(out_width, out_width, 1, activate=False)
        same = in_width == out_width
        self.downsample = nn.Identity() if same else NormedConv(in_width, out_width, 1, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, in_width, H, W] -> [B, out_width, H, W]``."""
        return F.silu(self.conv3(self.se(self.conv2(self.conv1(x)))) + self.downsample(x))


class NormedConv(nn.Module):
    """A convolution without bias that keeps H and W, LayerNorm over channels, perhaps SiLU."""

    def __init__(self, in_width: int, out_width: int, size: int, *, activate: bool, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, out_width, size, padding=size // 2, groups=groups, bias=False)
        self.bn = nn.LayerNorm(out_width)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, in_width, H, W] -> [B, out_width, H, W]``."""
        x = self.bn(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.silu(x) if self.activate else x


class SqueezeExcitation(nn.Module):
    """Gate each channel by a two-layer MLP of all channel means (arXiv 1709.01507)."""

    def __init__(self, width: int, squeezed_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed_width, 1)
        self.fc2 = nn.Conv2d(squeezed_width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, width, H, W]``, gated."""
        mean = x.mean((2, 3), keepdim=True)
        return x * self.fc2(F.silu(self.fc1(mean))).sigmoid()
