"""RetinaNet: images to raw predictions (Lin et al. 2017, figure 3). One return type in every mode."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retinanet.anchors import P2_STRIDES, AnchorGenerator, build_anchors
from retinanet.backbone import ResNetBackbone, load_backbone_weights
from retinanet.config import InputConfig, ModelConfig
from retinanet.fpn import FPN
from retinanet.head import Subnet, prior_bias
from retinanet.structures import Predictions


class RetinaNet(nn.Module):
    """The detector. All weights start at random: `build_model` or `load_checkpoint` bring trained ones.

    `num_classes` counts foreground classes only. `mean` and `std` (RGB, 0..255) are buffers and travel with the weights.
    The other arguments are explained at their fields in `retinanet.config.ModelConfig`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_classes: int = 80,
        backbone: str = "resnet50",
        *,
        norm: str = "frozen",
        norm_eps: float = 1e-5,
        stride_in_1x1: bool = False,
        freeze_stages: int = 0,
        fpn_channels: int = 256,
        p6_from: str = "c5",
        p7_relu: bool = True,
        head_convs: int = 4,
        head_norm: str = "none",
        head_init: str = "paper",
        prior: float = 0.01,
        anchors: AnchorGenerator | None = None,
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375),
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.anchor_generator = anchors or AnchorGenerator()
        with_c2 = self.anchor_generator.strides == P2_STRIDES
        stages = {"stride_in_1x1": stride_in_1x1, "freeze_stages": freeze_stages, "with_c2": with_c2}
        self.backbone = ResNetBackbone(backbone, norm=norm, norm_eps=norm_eps, **stages)  # type: ignore[arg-type]
        self.fpn = FPN(self.backbone.out_channels, fpn_channels, p6_from=p6_from, p7_relu=p7_relu)
        num_anchors = self.anchor_generator.num_anchors
        form = {"num_convs": head_convs, "norm": head_norm, "init": head_init}
        self.cls_subnet = Subnet(fpn_channels, num_anchors, num_classes, final_bias=prior_bias(prior), **form)  # type: ignore[arg-type]
        self.box_subnet = Subnet(fpn_channels, num_anchors, 4, **form)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))

    def forward(self, images: Tensor, image_sizes: Tensor | Sequence[tuple[int, int]] | None = None) -> Predictions:
        """Raw predictions for `images` [B, 3, H, W], uint8 or float on the 0..255 scale, RGB.

        `image_sizes` [B, 2] are the (height, width) before padding: what lies outside is set to 0 after normalising,
        so that the padding's content cannot matter. None: nothing is padding.
        """
        normalized = self.normalize(images, image_sizes).to(self.backbone.conv1.weight.dtype)  # [B, 3, H, W]
        pyramid = self.fpn(self.backbone(normalized))
        grid_sizes = [(features.shape[-2], features.shape[-1]) for features in pyramid]
        return Predictions(
            cls_logits=self.cls_subnet(pyramid),  # [B, R, K]
            box_deltas=self.box_subnet(pyramid),  # [B, R, 4]
            anchors=self.anchor_generator(grid_sizes, (images.shape[-2], images.shape[-1])),  # [R, 4]
            level_sizes=[height * width * self.anchor_generator.num_anchors for height, width in grid_sizes],
        )

    def normalize(self, images: Tensor, image_sizes: Tensor | Sequence[tuple[int, int]] | None = None) -> Tensor:
        """(images - mean) / std in float32, 0 outside `image_sizes`."""
        normalized = (images - self.mean).div_(self.std)
        if image_sizes is None:
            return normalized
        sizes = torch.as_tensor(image_sizes, device=images.device)
        rows = torch.arange(images.shape[-2], device=images.device) < sizes[:, :1]  # [B, H]
        columns = torch.arange(images.shape[-1], device=images.device) < sizes[:, 1:]  # [B, W]
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return normalized.masked_fill_(~inside, 0)  # not *: the padding may hold NaN


def build_model(config: ModelConfig, input: InputConfig, *, trained_backbone: bool = True) -> RetinaNet:
    """The model a config describes; `trained_backbone=False` skips `backbone_weights` (a checkpoint follows)."""
    if config.num_classes is None:
        raise ValueError("model.num_classes is unknown before the data is read")
    model = RetinaNet(
        config.num_classes,
        config.backbone,
        norm=config.norm,
        norm_eps=config.norm_eps,
        stride_in_1x1=config.stride_in_1x1,
        freeze_stages=config.freeze_stages,
        fpn_channels=config.fpn_channels,
        p6_from=config.p6_from,
        p7_relu=config.p7_relu,
        head_convs=config.head_convs,
        head_norm=config.head_norm,
        head_init=config.head_init,
        prior=config.prior,
        anchors=build_anchors(config.anchors),
        mean=input.mean,
        std=input.std,
    )
    if trained_backbone and config.backbone_weights != "none":
        load_backbone_weights(model.backbone, config.backbone, config.backbone_weights)
    return model
