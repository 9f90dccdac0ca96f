"""The vision tower: any Hugging Face vision model, seen as pixels -> (images, tokens, width)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d
from transformers import MODEL_MAPPING, AutoConfig, AutoModel

from llava_simplified.data.transforms import ImageTransform
from llava_simplified.model.protocols import VisionModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class VisionTower(nn.Module):
    """A vision model and the choice of which of its features are shown to the language model.

    Vision transformers (CLIP, SigLIP, DINOv2, ViT) give one token per patch; convolutional models (EfficientNet,
    ConvNeXt, ResNet) one per position of a feature map.

    Args:
        model: any model that takes `pixel_values` and returns `last_hidden_state` and `hidden_states`.
        transform: how its pictures are resized and normalised.
        select_layer: which hidden states. -1 is the last one, -2 (the layer before) is what LLaVA chose for
            CLIP. Several are concatenated along the width (for feature maps of several sizes: on the grid of
            the smallest).
        select_feature: "patch", or "cls_patch" to keep the tokens that are no patch (CLS, registers) in front.
        token_pool: average the grid down to `token_pool` x `token_pool` tokens; 0 keeps it.

    Attributes:
        num_tokens, width: the features of one image are (num_tokens, width).
        used_parameters: the model's parameters that they depend on. Those of the layers above the selected one have no part in it.
    """

    def __init__(
        self,
        model: VisionModel,
        transform: ImageTransform,
        select_layer: int | Sequence[int] = -2,
        select_feature: str = "patch",
        token_pool: int = 0,
    ) -> None:
        super().__init__()
        if select_feature not in ("patch", "cls_patch"):
            raise ValueError(
                f"mm_vision_select_feature is patch or cls_patch, not {select_feature!r}"
            )
        self.model: VisionModel = model
        self.transform = transform
        self.select_layers = (
            (select_layer,) if isinstance(select_layer, int) else tuple(select_layer)
        )
        self.select_feature = select_feature
        self.token_pool = token_pool
        self.num_tokens, self.width, self.grid, self.used_parameters = self._trace()

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, *, dtype: torch.dtype = torch.float32, **choices: object
    ) -> VisionTower:
        """Load a vision model, or the vision half of a two-tower model (CLIP, SigLIP), with its image transform.

        Raises:
            ValueError: it is no vision model, weights are missing, or its image processor does what `ImageTransform` can't.
            OSError: the files are not there (the message says which).
        """
        config = AutoConfig.from_pretrained(name_or_path)
        config = getattr(config, "vision_config", config)
        transform = ImageTransform.from_pretrained(name_or_path)
        model_class: Any = MODEL_MAPPING.get(type(config), None)
        if model_class is None or getattr(model_class, "main_input_name", "") != "pixel_values":
            raise ValueError(f"{name_or_path}: a {config.model_type} is not a vision model")
        model, report = model_class.from_pretrained(
            name_or_path, config=config, dtype=dtype, output_loading_info=True
        )
        tower = cls(model, transform, **choices)  # type: ignore[arg-type]
        check_missing_keys(
            name_or_path, tower.used_parameters & set(report["missing_keys"])
        )  # a pooling head may well be missing
        return tower

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, transform: ImageTransform, **choices: object
    ) -> VisionTower:
        """The tower without its weights, on the meta device: enough to know its shape."""
        with torch.device("meta"):
            return cls(AutoModel.from_config(config), transform, **choices)  # type: ignore[arg-type]

    @property
    def frozen(self) -> bool:
        """True when no parameter of the tower is trained."""
        return not any(p.requires_grad for p in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the features."""
        return next(self.parameters()).dtype

    def train(self, mode: bool = True) -> VisionTower:
        """A frozen tower stays in evaluation mode; one that trains keeps its batch norms' statistics: no picture moves another."""
        super().train(mode and not self.frozen)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patch features.

        Args:
            pixel_values: (images, 3, height, width); uint8 as the transform makes them, or floats already normalised.

        Returns:
            (images, num_tokens, width)
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = self.transform.normalize(pixel_values)
        pixel_values = pixel_values.to(self.dtype)
        if self.is_convolutional:
            pixel_values = pixel_values.contiguous(
                memory_format=torch.channels_last
            )  # several times faster on CPU
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self._select(self.model, pixel_values)[0]

    def _select(
        self, model: VisionModel, pixel_values: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """The features, and the (rows, columns) of places that their last tokens stand for."""
        outputs = model(pixel_values, output_hidden_states=True)
        if outputs.last_hidden_state.dim() == 4:
            return self._from_maps(outputs)
        features = torch.cat([outputs.hidden_states[layer] for layer in self.select_layers], dim=-1)
        height, width = (
            side // patch for side, patch in zip(pixel_values.shape[-2:], _patch_size(model))
        )
        merged = (
            isqrt(height * width // features.shape[1]) or 1
        )  # neighbours become one on the way up: Swin, FocalNet
        height, width = height // merged, width // merged
        others = (
            features.shape[1] - height * width
        )  # CLS and register tokens stand in front of the patches
        if self.select_feature == "cls_patch":
            if self.token_pool or not others:
                raise ValueError(
                    "cls_patch can't be pooled"
                    if self.token_pool
                    else "this tower has no CLS token: use patch"
                )
            return features, (height, width)
        features = features[:, others:]
        if self.token_pool:
            grid = features.transpose(1, 2).unflatten(2, (height, width))
            features = adaptive_avg_pool2d(grid, self.token_pool).flatten(2).transpose(1, 2)
            height = width = self.token_pool
        return features, (height, width)

    def _from_maps(self, outputs: object) -> tuple[torch.Tensor, tuple[int, int]]:
        """Feature maps (images, channels, height, width) -> (images, tokens, channels)."""
        if self.select_feature == "cls_patch":
            raise ValueError("a convolutional tower has no CLS token: use patch")
        last: torch.Tensor = outputs.last_hidden_state  # type: ignore[attr-defined]
        hidden: tuple[torch.Tensor, ...] = outputs.hidden_states  # type: ignore[attr-defined]
        # -1 means the very last map: EfficientNet's last hidden state lies one convolution before it
        maps = [last if layer == -1 else hidden[layer] for layer in self.select_layers]
        grid = min((m.shape[-2:] for m in maps), key=lambda size: size.numel())
        if self.token_pool:
            grid = torch.Size((self.token_pool, self.token_pool))
        maps = [
            m if m.shape[-2:] == grid else adaptive_avg_pool2d(m, (grid[0], grid[1])) for m in maps
        ]
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2), (grid[0], grid[1])

    @property
    def is_convolutional(self) -> bool:
        return not hasattr(self.model.config, "num_attention_heads")

    def _trace(self) -> tuple[int, int, tuple[int, int], frozenset[str]]:
        """Tokens, width and grid of one image, and the parameters that they depend on: not those of the layers above.

        The one place where they are known: the architecture, run on no data.
        """
        with torch.device("meta"), torch.enable_grad():
            skeleton = AutoModel.from_config(self.model.config).eval()
            pixels = torch.empty(1, 3, *self.transform.crop)
            try:
                features, grid = self._select(skeleton, pixels)
                names, parameters = zip(*skeleton.named_parameters())
                gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
            except IndexError:
                count = len(skeleton(pixels, output_hidden_states=True).hidden_states)
                raise ValueError(
                    f"mm_vision_select_layer {self.select_layers} is out of range: the tower has {count} hidden states"
                ) from None
            except (AttributeError, RuntimeError, TypeError) as error:
                raise ValueError(
                    f"a {self.model.config.model_type} can't be the vision tower: from `pixel_values` alone it gives no "
                    f"grid of features ({type(error).__name__}: {error})"
                ) from error
        used_parameters = frozenset(
            name for name, gradient in zip(names, gradients) if gradient is not None
        )
        return features.shape[1], features.shape[2], grid, used_parameters


def check_missing_keys(source: str, missing: Collection[str]) -> None:
    """Raise ValueError where weights are missing: transformers would only warn, and draw them at random."""
    if missing:
        raise ValueError(f"{source}: weights are missing: {', '.join(sorted(missing)[:5])}")


def _patch_size(model: VisionModel) -> tuple[int, int]:
    size = model.config.patch_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])
