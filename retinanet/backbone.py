"""torchvision's ResNets without their classifier: images to C3, C4, C5 (strides 8, 16, 32), or from C2 on."""

import zipfile
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn

from retinanet.bounded import check_unfolding
from retinanet.download import download
from retinanet.errors import UserError
from retinanet.torchvision_import import import_torchvision


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm whose statistics and affine part are constants: a scale and a shift per channel.

    Has torchvision's keys. Stays in the number format of its input: mixing float32 constants into bf16 activations would
    turn every one of them into float32, at twice the memory traffic (measured: 1.5 times the time of a training step).
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight: Tensor
        self.bias: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor
        for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), start))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.to(x.dtype).view(1, -1, 1, 1), x, scale.to(x.dtype).view(1, -1, 1, 1))


IMAGENET = {"imagenet": "IMAGENET1K_V1", "imagenet_v2": "IMAGENET1K_V2"}  # by torchvision's names


class ResNetBackbone(nn.Module):
    """`name` is a torchvision ResNet or ResNeXt; parameters keep torchvision's names (`conv1.weight`, `layer1.0...`).

    `stride_in_1x1` downsamples in a bottleneck's first convolution, as Caffe did and detectron2's weights need.
    `norm`: frozen (BatchNorm whose statistics and affine part are constants), batch, sync or group.
    `with_c2` puts C2 (stride 4) out too, which a pyramid with P2 is made from.
    `freeze_stages` counts frozen stages from the input on (1: stem, 2: and layer1, ... 5: all); their norms are held too.
    Weights are random here; `load_backbone_weights` fills them in.
    """

    def __init__(
        self,
        name: str = "resnet50",
        *,
        norm: str = "frozen",
        norm_eps: float = 1e-5,
        stride_in_1x1: bool = False,
        freeze_stages: int = 0,
        with_c2: bool = False,
    ) -> None:
        super().__init__()
        body = getattr(import_torchvision().models, name)(weights=None, norm_layer=_norm_layer(norm, norm_eps))
        if stride_in_1x1:
            _move_strides(body)
        self.conv1, self.bn1, self.relu, self.maxpool = body.conv1, body.bn1, body.relu, body.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = body.layer1, body.layer2, body.layer3, body.layer4
        self.freeze_stages, self.with_c2 = freeze_stages, with_c2
        layers = [self.layer1, self.layer2, self.layer3, self.layer4][0 if with_c2 else 1 :]
        self.out_channels = [_width(layer) for layer in layers]  # of (C2,) C3, C4, C5
        for module in self._frozen_modules():
            module.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> C3 [B, c3, H/8, W/8], C4 [B, c4, H/16, W/16], C5 [B, c5, H/32, W/32]; C2 first if asked."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        c2 = self.layer1(x)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c2, c3, c4, self.layer4(c4)] if self.with_c2 else [c3, c4, self.layer4(c4)]

    def train(self, mode: bool = True) -> "ResNetBackbone":
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()  # a frozen stage must not keep updating its BatchNorm statistics
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        stages: list[list[nn.Module]] = [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3], [self.layer4]]
        return [module for stage in stages[: self.freeze_stages] for module in stage]


def load_backbone_weights(backbone: ResNetBackbone, name: str, source: str) -> None:
    """Fills `backbone` from `source`: "imagenet", "imagenet_v2" (downloads of torchvision) or a state dict's path.

    Raises `UserError` when it cannot be had or does not fit.
    """
    state = _download(name, IMAGENET[source]) if source in IMAGENET else _read_state_dict(Path(source))
    wanted = backbone.state_dict()
    if any("running_mean" in key for key in state) and not any("running_mean" in key for key in wanted):
        raise UserError(f"model.backbone_weights {source} has BatchNorm; model.norm group has none: use norm frozen or batch")
    found = {key: value for key, value in state.items() if key in wanted and value.shape == wanted[key].shape}
    missing = [key for key in wanted if key not in found and not key.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"model.backbone_weights {source} does not fit {name}: {len(missing)} of {len(wanted)} tensors are missing "
            f"or have another shape, e.g. {missing[0]}"
        )
    backbone.load_state_dict(found, strict=False)


def is_backbone_file(source: str) -> bool:
    """Whether `source` is the file of a state dict that `load_backbone_weights` would read."""
    try:
        return "layer1.0.conv1.weight" in _read_state_dict(Path(source))
    except UserError:
        return False


def _download(name: str, version: str) -> dict[str, Tensor]:
    try:
        weights = import_torchvision().models.get_model_weights(name)[version]
    except KeyError:
        raise UserError(f"model.backbone_weights: torchvision has no {version} for {name}") from None
    cache = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]  # where torchvision keeps it too
    if not cache.exists():
        try:
            print(f"downloading {weights.url} to {cache}", flush=True)
            download(weights.url, cache, ("sha256", cache.stem.rsplit("-", 1)[1]), largest=1 << 30)
        except (OSError, UserError, HTTPException) as error:  # no network, wrong hash, connection broken off
            raise UserError(
                f"model.backbone_weights: {weights.url} could not be downloaded ({error}); put the file at {cache} by hand, "
                "or name a file, or none"
            ) from None
    return _read_state_dict(cache)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_unfolding(archive, path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"model.backbone_weights {path} does not exist (a detector of the zoo goes into train.init_from)"
        ) from None
    except Exception as error:  # of any kind: bytes that mean something else fail anywhere in the unpickler
        raise UserError(f"model.backbone_weights {path} is not a torch state dict ({type(error).__name__})") from None
    if isinstance(state, dict) and "categories" in state:  # a checkpoint of ours
        raise UserError(
            f"model.backbone_weights {path} is a whole detector: set train.init_from={path}, and for its backbone alone "
            "train.init_part=backbone"
        )
    plain = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not plain:
        raise UserError(f"model.backbone_weights {path} is not a plain state dict of tensors (torchvision's format)")
    return state


def _norm_layer(norm: str, eps: float) -> Callable[[int], nn.Module]:
    layers: dict[str, Callable[[int], nn.Module]] = {
        "frozen": partial(FrozenBatchNorm2d, eps=eps),
        "batch": partial(nn.BatchNorm2d, eps=eps),
        "sync": partial(nn.SyncBatchNorm, eps=eps),
        "group": partial(nn.GroupNorm, 32),
    }
    return layers[norm]


def _move_strides(body: nn.Module) -> None:
    """From the 3x3 convolution of each bottleneck to the 1x1 before it."""
    for block in body.modules():
        if hasattr(block, "conv3"):
            one, three = block.get_submodule("conv1"), block.get_submodule("conv2")
            assert isinstance(one, nn.Conv2d)
            assert isinstance(three, nn.Conv2d)
            one.stride, three.stride = three.stride, one.stride


def _width(layer: nn.Module) -> int:
    """Channels that a stage puts out: those of its last convolution."""
    return [module for module in layer.modules() if isinstance(module, nn.Conv2d)][-1].out_channels
