"""The two subnets: the same four convolutions on every level, apart for classes and for boxes (paper section 4)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

GROUPS = 32


class Subnet(nn.Module):
    """`num_convs` 3x3 convolutions with ReLU, shared by all levels, and one that puts out `outputs` for each anchor.

    `norm` "group" normalises after each of them. `final_bias` starts the last convolution's bias.
    `init` "paper" starts all weights at N(0, 0.01): each convolution of 256 channels lets a third of the signal's size
    through, four of them 1 %, and the classes are learned late. "he" keeps its size up to the last one (He et al. 2015).
    """

    def __init__(
        self,
        channels: int,
        num_anchors: int,
        outputs: int,
        *,
        num_convs: int = 4,
        norm: str = "none",
        init: str = "paper",
        final_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.outputs = outputs
        layers: list[nn.Module] = []
        for _ in range(num_convs):
            layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=norm == "none"))
            if norm == "group":
                layers.append(nn.GroupNorm(GROUPS, channels))
            layers.append(nn.ReLU(inplace=True))
        self.convs = nn.Sequential(*layers)
        self.final = nn.Conv2d(channels, num_anchors * outputs, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if init == "he" and module is not self.final:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                else:
                    nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.final.bias, final_bias)  # type: ignore[arg-type]

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """P3..P7 [B, C, h, w] -> [B, R, outputs], R over levels, rows, columns, anchors."""
        return torch.cat([self._level(features) for features in pyramid], dim=1)

    def _level(self, features: Tensor) -> Tensor:
        out = self.final(self.convs(features))  # [B, A * outputs, h, w]
        return out.permute(0, 2, 3, 1).reshape(out.shape[0], -1, self.outputs)  # a view in channels_last


def prior_bias(probability: float) -> float:
    """The logit that makes every anchor start at this foreground probability (paper section 4.1)."""
    return -math.log((1 - probability) / probability)
