"""Feature Pyramid Network with the two extra levels of RetinaNet (Lin et al. 2017a; paper section 4, footnote 2)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FPN(nn.Module):
    """C3, C4, C5 to P3..P7, all of `channels`. P6 is a stride-2 convolution of C5 or P5, P7 one of ReLU(P6), or of P6.

    With four `in_channels` C2 comes before C3 and P2 before P3; its weights have names of their own, so that those of the
    other levels are called the same in both.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256, *, p6_from: str = "c5", p7_relu: bool = True) -> None:
        super().__init__()
        self.p6_from, self.p7_relu = p6_from, p7_relu
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels[-3:])
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.has_p2 = len(in_channels) == 4
        if self.has_p2:
            self.lateral_c2 = nn.Conv2d(in_channels[0], channels, 1)
            self.output_p2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.p6 = nn.Conv2d(in_channels[-1] if p6_from == "c5" else channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)  # Caffe2's XavierFill
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """[C3, C4, C5] -> [P3, P4, P5, P6, P7], or [C2, C3, C4, C5] -> [P2, P3, P4, P5, P6, P7]."""
        laterals = [self.lateral_c2, *self.lateral] if self.has_p2 else self.lateral
        outputs = [self.output_p2, *self.output] if self.has_p2 else self.output
        merged = [lateral(c) for lateral, c in zip(laterals, features, strict=True)]
        for fine in range(len(merged) - 2, -1, -1):  # top-down
            coarse = merged[fine + 1]
            merged[fine] = merged[fine] + F.interpolate(coarse, size=merged[fine].shape[-2:], mode="nearest")
        pyramid = [output(m) for output, m in zip(outputs, merged, strict=True)]
        p6 = self.p6(features[-1] if self.p6_from == "c5" else pyramid[-1])
        return [*pyramid, p6, self.p7(F.relu(p6) if self.p7_relu else p6)]
