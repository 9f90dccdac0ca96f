"""The vision tower: any vision model of Transformers, as a function from pixels to features.

vision transformer (CLIP, SigLIP, DINOv2, ViT)      convolutional (EfficientNet, ConvNeXt, ResNet)

hidden states (images, 1 + 196, 768)                feature maps (images, 1280, 7, 7)
  | select_layer: one, or several concatenated        | select_layer: all pooled to the smallest grid
  | select_feature: drop the CLS token                |
  | token_pool: average the 14 x 14 grid              | token_pool
  v                                                   v
(images, 196, 768)                                  (images, 49, 1280)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d
from transformers import MODEL_MAPPING, AutoConfig, AutoModel

from llava_simplified.data.transforms import ImageTransform
from llava_simplified.foreign_files import blame_file
from llava_simplified.hub import check_model_config, check_model_name
from llava_simplified.model.protocols import VisionModel
from llava_simplified.model.skip_layers import record_layers, skip_layers, unused_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class _Shape(NamedTuple):
    """The properties of a tower that follow from its config; see the attributes of `VisionTower`."""

    num_tokens: int
    width: int
    grid: tuple[int, int]
    used_parameters: frozenset[str]
    unused_layers: tuple[str, ...]


class VisionTower(nn.Module):
    """A vision model that returns selected features, which are the input of the projector.

    Args:
        model: A model that accepts `pixel_values` and returns `last_hidden_state` and `hidden_states`.
        transform: Padding, resize, crop and normalization of the images.
        select_layer: Index of the hidden state to use. -1 is the output of the last layer; -2 is the output of
            the layer before it, which LLaVA uses for CLIP. Several hidden states are concatenated along the
            channels.
        select_feature: `patch`, or `cls_patch` to also keep the tokens that precede the patches (CLS,
            registers).
        token_pool: Average the grid of patches to `token_pool` x `token_pool` tokens; 0 keeps all patches.

    Attributes:
        num_tokens: Number of tokens per image.
        width: Hidden size, the number of channels of a token.
        grid: Number of rows and columns of the grid of patches (after pooling).
        used_parameters: Names of the model's parameters that the features depend on. Parameters of the layers
            after the selected one, for example, are excluded.
        unused_layers: Names of the model's layers that are not computed, because the features do not depend on them.
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
                f"--mm_vision_select_feature must be patch or cls_patch, not {select_feature!r}"
            )
        self.model: VisionModel = model
        self.transform = transform
        if isinstance(select_layer, int):
            select_layer = (select_layer,)
        self.select_layers = tuple(select_layer)
        if not self.select_layers:
            raise ValueError("--mm_vision_select_layer must name at least one layer")
        self.select_feature = select_feature
        self.token_pool = token_pool
        shape = self._trace()
        self.num_tokens = shape.num_tokens
        self.width = shape.width
        self.grid = shape.grid
        self.used_parameters = shape.used_parameters
        self.unused_layers = shape.unused_layers
        # A tuple, and not a `ModuleList`, because the model owns these layers.
        self._skipped = tuple(model.get_submodule(name) for name in shape.unused_layers)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        dtype: torch.dtype = torch.float32,
        image_aspect_ratio: str = "crop",
        **choices: Any,
    ) -> VisionTower:
        """Load a vision model, or the vision half of a two-tower model (CLIP, SigLIP).

        Args:
            name_or_path: Folder or hub name, with a `preprocessor_config.json`.
            dtype: Data type of the weights.
            image_aspect_ratio: "crop" or "pad", see `ImageTransform.from_pretrained`.
            **choices: `select_layer`, `select_feature` and `token_pool` of the constructor.

        Raises:
            ValueError: The model is not a vision model, weights are missing, or its image processor
                does something that `ImageTransform` does not support.
            OSError: A file is missing. The message names the file.
        """
        check_model_name(name_or_path)
        check_model_config(name_or_path)
        with blame_file(name_or_path):
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        transform = ImageTransform.from_pretrained(name_or_path, image_aspect_ratio)
        model_class: Any = MODEL_MAPPING.get(type(config), None)
        if model_class is None or getattr(model_class, "main_input_name", "") != "pixel_values":
            raise ValueError(
                f"{name_or_path}: {config.model_type} is not the type of a vision model; choose another --vision_tower"
            )
        with blame_file(name_or_path):
            model, loading_info = model_class.from_pretrained(
                name_or_path,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
            )
        tower = cls(cast(VisionModel, model), transform, **choices)
        # Check only the parameters that are used. A pooling head, for example, may be missing.
        check_missing_keys(name_or_path, tower.used_parameters & set(loading_info["missing_keys"]))
        return tower

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, transform: ImageTransform, **choices: Any
    ) -> VisionTower:
        """Build the tower on the meta device, without weights, for example to find out its number of tokens.

        Args:
            config: Transformers config of a vision model or of a two-tower model.
            transform: Padding, resize, crop and normalization of the images.
            **choices: `select_layer`, `select_feature` and `token_pool` of the constructor.
        """
        config = getattr(config, "vision_config", config)
        with torch.device("meta"):
            model: Any = AutoModel.from_config(config, trust_remote_code=False)
            return cls(cast(VisionModel, model), transform, **choices)

    @property
    def frozen(self) -> bool:
        """Whether no parameter of the tower is trained."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights and of the features."""
        return next(self.parameters()).dtype

    @property
    def is_convolutional(self) -> bool:
        """Whether the model is a convolutional network. All other models are vision transformers and have attention heads."""
        return not hasattr(self.model.config, "num_attention_heads")

    def train(self, mode: bool = True) -> VisionTower:
        """Set the training mode, except for a frozen tower and for batch norms.

        A frozen tower stays in evaluation mode, so that it applies no dropout. The batch norms of a trained tower
        also stay in evaluation mode: with batch statistics, the features of an image would depend on the other
        images of the batch.
        """
        super().train(mode and not self.frozen)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute the features of images.

        Args:
            pixel_values: (images, 3, height, width); uint8, as the transform returns them, or floats that are
                normalized already.

        Returns:
            (images, num_tokens, hidden size), in the tower's dtype.
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = self.transform.normalize(pixel_values)
        pixel_values = pixel_values.to(self.dtype)
        if self.is_convolutional:
            # Convolutions in this memory format are several times faster on a CPU.
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        # Disable gradients for a frozen tower, so that it stores no activations.
        with_gradient = torch.is_grad_enabled() and not self.frozen
        with torch.set_grad_enabled(with_gradient), skip_layers(self._skipped):
            features, _ = self._select(self.model, pixel_values)
        return features

    def _select(
        self, model: VisionModel, pixel_values: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """Run a vision model and select features.

        Returns:
            The features (images, tokens, hidden size), and the numbers of rows and columns of the patches.
        """
        outputs = model(pixel_values, output_hidden_states=True)
        if outputs.last_hidden_state.dim() == 4:
            return self._select_maps(outputs.last_hidden_state, outputs.hidden_states)
        hidden_states = [outputs.hidden_states[layer] for layer in self.select_layers]
        # (images, CLS and registers + patches, hidden size)
        features = torch.cat(hidden_states, dim=-1)
        rows, columns = _patch_grid(model, pixel_values, features.shape[1])

        # CLS and register tokens precede the patches.
        num_others = features.shape[1] - rows * columns
        if self.select_feature == "cls_patch":
            if self.token_pool:
                raise ValueError(
                    "--mm_vision_select_feature cls_patch cannot be combined with --mm_token_pool; leave out one of "
                    "the two"
                )
            if not num_others:
                raise ValueError(
                    "this vision tower has no CLS token; pass --mm_vision_select_feature patch"
                )
            return features, (rows, columns)
        features = features[:, num_others:]
        if not self.token_pool:
            return features, (rows, columns)
        # Pooling requires (images, channels, rows, columns).
        maps = features.transpose(1, 2).unflatten(2, (rows, columns))
        pooled = adaptive_avg_pool2d(maps, self.token_pool)
        features = pooled.flatten(2).transpose(1, 2)
        return features, (self.token_pool, self.token_pool)

    def _select_maps(
        self, last_hidden_state: torch.Tensor, hidden_states: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """Select features of a convolutional model, whose states are (images, channels, rows, columns)."""
        if self.select_feature == "cls_patch":
            raise ValueError(
                "a convolutional vision tower has no CLS token; pass --mm_vision_select_feature patch"
            )
        maps: list[torch.Tensor] = []
        for layer in self.select_layers:
            # For layer -1, use `last_hidden_state`: EfficientNet applies one more convolution after the last
            # entry of `hidden_states`.
            maps.append(last_hidden_state if layer == -1 else hidden_states[layer])
        # The maps of early layers are larger. Pool all maps to the smallest grid, so that their channels can be
        # concatenated.
        sizes = [feature_map.shape[-2:] for feature_map in maps]
        grid = min(sizes, key=torch.Size.numel)
        if self.token_pool:
            grid = torch.Size((self.token_pool, self.token_pool))
        rows, columns = grid
        for i, feature_map in enumerate(maps):
            if feature_map.shape[-2:] != grid:
                maps[i] = adaptive_avg_pool2d(feature_map, (rows, columns))
        features = torch.cat(maps, dim=1)  # (images, channels, rows, columns)
        features = features.flatten(2).transpose(1, 2)
        return features, (rows, columns)

    def _trace(self) -> _Shape:
        """Find out the shape of the features, which parameters they depend on, and which layers can be skipped.

        For this, run a forward and a backward pass on the meta device, without data. Exactly the parameters that
        the features depend on get a gradient.

        Raises:
            ValueError: A selected layer does not exist, or the model returns no grid of features.
        """
        with torch.device("meta"), torch.enable_grad():
            # Build a second model, because `self.model` is not on the meta device, and PEFT may have wrapped it.
            model: Any = AutoModel.from_config(self.model.config, trust_remote_code=False).eval()
            pixel_values = torch.empty(1, 3, *self.transform.crop)
            try:
                with record_layers(model) as recorded:
                    features, grid = self._select(model, pixel_values)
                names, parameters = zip(*model.named_parameters())
                gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
            except IndexError:
                # `hidden_states[layer]` does not exist. Run the model again to count its hidden states, which takes
                # no time on the meta device.
                count = len(model(pixel_values, output_hidden_states=True).hidden_states)
                raise ValueError(
                    f"--mm_vision_select_layer {self.select_layers} is out of range: the vision tower has "
                    f"{count} hidden states; pass numbers from {-count} to {count - 1}"
                ) from None
            except (AttributeError, RuntimeError, TypeError) as error:
                # Models of other kinds fail in different ways if they are called with `pixel_values` only.
                raise ValueError(
                    f"{self.model.config.model_type} cannot be used as a vision tower: if it is called with "
                    "`pixel_values` only, it does not return a grid of features "
                    f"({type(error).__name__}: {error}). Choose another --vision_tower"
                ) from error
        used = [name for name, gradient in zip(names, gradients) if gradient is not None]
        return _Shape(
            num_tokens=features.shape[1],
            width=features.shape[2],
            grid=grid,
            used_parameters=frozenset(used),
            unused_layers=unused_layers(model, recorded, used),
        )


def check_missing_keys(source: str, missing: Collection[str]) -> None:
    """Raise ValueError if weights are missing. Transformers only warns, and uses random weights instead.

    Args:
        source: Folder or hub name of the model, for the message.
        missing: Names of the missing weights.
    """
    if missing:
        raise ValueError(
            f"{source}: weights are missing: {', '.join(sorted(missing)[:5])}. Copy or download the model again, or "
            "choose another model."
        )


def _patch_grid(model: VisionModel, pixel_values: torch.Tensor, num_tokens: int) -> tuple[int, int]:
    """Return the numbers of rows and columns of a vision transformer's patches after its last layer.

    Args:
        model: The vision transformer.
        pixel_values: Its input (images, 3, height, width).
        num_tokens: Number of tokens that it returns, including CLS and registers.
    """
    patch_size = model.config.patch_size
    if isinstance(patch_size, int):
        patch_size = (patch_size, patch_size)
    height, width = pixel_values.shape[-2:]
    rows, columns = height // patch_size[0], width // patch_size[1]
    # Swin and FocalNet merge neighboring patches between their stages: each token of the last stage
    # covers `merged` x `merged` patches.
    merged = isqrt(rows * columns // num_tokens) or 1
    return rows // merged, columns // merged
