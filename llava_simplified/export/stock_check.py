"""Compare a checkpoint with the stock LLaVA folder that it was exported to, or imported from.

"Stock LLaVA" means the LLaVA classes of Transformers (see `stock.py`). The folder is loaded as users load
it, with `AutoModelForImageTextToText` and `AutoProcessor`. For each image, four results are compared, in this
order, since each depends on the previous ones:

1. the token ids of the prompt must be equal;
2. the pixel values may differ by two gray levels (see `MAX_GRAY_LEVELS`);
3. the logits of the first generated token may differ by rounding only (see `LOGIT_TOLERANCE`). Both
   models receive the same pixel values here, so that the differences in step 2 have no effect;
4. the greedy captions must be equal, except for ties: at the first difference, the two tokens must have
   the same logit up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava_simplified.data.images import (
    ImageSource,
    decode_image,
    load_pixels,
    read_image_bytes,
)
from llava_simplified.data.records import ALL_RECORDS, open_records
from llava_simplified.foreign_files import blame_file
from llava_simplified.model.generation import DecodingBatch
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.language_model import lm_head_at_positions
from llava_simplified.model.llava import Llava
from llava_simplified.model.peft_names import PeftModel
from llava_simplified.prompt import FIXED_DATE, IMAGE_INDEX, IMAGE_PLACEHOLDER

CAPTION_LENGTH = 16  # maximum number of tokens of a caption
# torch's resize rounds its filter weights to 16 bits, Pillow's to 22 bits. The results of any image differ
# by at most two of the 255 gray levels.
MAX_GRAY_LEVELS = 2.01
# Maximum difference of a logit between the two models, relative to the largest absolute logit (or to 1, if
# that is larger). The same computation in a different order differs by a few units in the last place; with
# a missing layer or a wrong activation, the difference is much larger.
LOGIT_TOLERANCE = {
    torch.float32: 5e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
# The end of error messages. The caller creates the output folder only if this comparison succeeds.
_NOTHING_WRITTEN = "The output folder was not created. Use the model in its original format."
_TRY_ANOTHER_DTYPE = "Pass --dtype bfloat16 or float32 to `llava export`."


@dataclass(frozen=True)
class Reference:
    """The outputs of a checkpoint for one image and the default instruction."""

    instruction: str
    input_ids: list[int]  # token ids of the prompt, with IMAGE_INDEX for each image token
    pixel_values: torch.Tensor  # (1, 3, height, width), normalized
    gray_level: torch.Tensor  # (3, 1, 1): size of one of the 255 gray levels in `pixel_values`
    logits: torch.Tensor  # (vocabulary,): logits of the first generated token
    caption_ids: list[int]  # token ids of the greedy caption


@dataclass(frozen=True)
class StockComparison:
    """The differences between a stock model and a checkpoint."""

    max_logit_difference: float
    equal_captions: int
    num_images: int
    image_kind: str  # "given images", "training images", "images of noise" or "generated images"

    def __str__(self) -> str:
        return (
            f"logits differ by {self.max_logit_difference:.3g}, {self.equal_captions} of "
            f"{self.num_images} greedy captions are equal ({self.image_kind})"
        )


def choose_images(
    training: dict[str, Any], images: Sequence[ImageSource]
) -> tuple[list[np.ndarray], str]:
    """Return images on which two models are compared, and the kind of these images.

    Args:
        training: The settings of the training run, from the checkpoint.
        images: Images that the user passed; may be empty.

    Returns:
        RGB images (height, width, 3), uint8, and "given images", "training images" or "images of
        noise".
    """
    if images:
        return [load_pixels(image) for image in images], "given images"
    from_training = _read_training_images(training)
    if from_training:
        return from_training, "training images"
    noise = []
    for seed in range(2):
        generator = np.random.default_rng(seed)
        noise.append(generator.integers(0, 256, (240, 320, 3), dtype=np.uint8))
    return noise, "images of noise"


def _read_training_images(training: dict[str, Any], count: int = 2) -> list[np.ndarray]:
    """Return the first training images that can be read; an empty list if the data have changed or moved."""
    records_path = Path(training.get("train_data_path") or "")
    folder = training.get("train_image_folder") or records_path.parent
    images: list[np.ndarray] = []
    # Any images will do, so skip bad records and images, which training tolerates too.
    with suppress(ValueError, OSError):
        if not records_path.is_file():
            return []
        records = open_records(records_path, max_bad_records=ALL_RECORDS)
        # Look at 16 records, since some may have no image.
        for index in range(min(len(records), 16)):
            with suppress(ValueError):
                for name in records[index].images:
                    images.append(decode_image(read_image_bytes(name, folder)))
            if len(images) >= count:
                break
    return images[:count]


# ---- the checkpoint ----


@torch.inference_mode()
def compute_reference(model: Llava, image: np.ndarray) -> Reference:
    """Return the prompt, the pixel values, the first logits and the greedy caption of one image.

    Args:
        model: A model on the CPU.
        image: RGB image (height, width, 3), uint8.

    Raises:
        ValueError: The logits are not finite. They would equal those of any other broken model.
    """
    # Remove the placeholder: stock processors always put the image before the text.
    instruction = model.instruction.replace(IMAGE_PLACEHOLDER, "").strip()
    prompt, pixels = model.prepare_inputs(instruction, [image])
    assert pixels is not None, "one image was given"
    tower = model.vision_tower
    pixel_values = tower.transform.normalize(pixels)
    features = tower(pixel_values)

    position = prompt.index(IMAGE_INDEX)
    image_tokens = [IMAGE_INDEX] * tower.num_tokens
    input_ids = prompt[:position] + image_tokens + prompt[position + 1 :]
    # Compute the logits of the last position only, which predicts the first token of the caption.
    last_position = torch.tensor([len(input_ids) - 1])
    with lm_head_at_positions(model.language_model, last_position):
        embeds = model.splice(torch.tensor([input_ids]), features)
        outputs = model.language_model(inputs_embeds=embeds, use_cache=False)
    if not outputs.logits.isfinite().all():
        dtype = str(model.language_model.dtype).removeprefix("torch.")
        raise ValueError(
            f"The logits of the checkpoint are not finite in {dtype}: its weights are damaged, or too large for this data "
            f"type. {_TRY_ANOTHER_DTYPE}"
        )

    options = GenerationOptions(max_new_tokens=CAPTION_LENGTH)
    batch = DecodingBatch(model, [prompt], features, options)
    while batch.active:
        batch.step()

    # One gray level is 1 / (255 std) per channel, since pixel values are (x / 255 - mean) / std.
    std = torch.tensor(tower.transform.std)
    return Reference(
        instruction=instruction,
        input_ids=input_ids,
        pixel_values=pixel_values,
        gray_level=(1 / (255 * std)).view(3, 1, 1),
        logits=outputs.logits.flatten(),
        caption_ids=batch.generated_ids[0],
    )


# ---- the stock model ----


@torch.inference_mode()
def compare_with_references(
    folder: Path,
    adapter: Path | None,
    images: Sequence[np.ndarray],
    references: Sequence[Reference],
    image_kind: str,
    *,
    chat_template: str | None = None,
    image_processor: Any = None,
) -> StockComparison:
    """Load a folder with stock classes, and compare it with a checkpoint.

    Args:
        folder: The stock LLaVA folder.
        adapter: Folder of a PEFT adapter for it, or None.
        images: RGB images (height, width, 3), uint8.
        references: The outputs of the checkpoint for each image.
        image_kind: Kind of the images, for the result.
        chat_template: Jinja template that replaces the template in the folder.
        image_processor: Image processor that replaces the one in the folder.

    Raises:
        ValueError: Prompt, pixel values, logits or caption differ from the checkpoint's, or the folder's
            processor cannot be used.
    """
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="auto", trust_remote_code=False
    ).eval()
    dtype = model.dtype
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    processor = load_stock_processor(folder)
    processor.chat_template = chat_template or processor.chat_template
    processor.image_processor = image_processor or processor.image_processor
    largest = 0.0
    equal_captions = 0
    for image, reference in zip(images, references):
        inputs = _process(processor, image, reference.instruction)
        _check_prompt(inputs, model.config.image_token_index, reference)
        _check_pixels(inputs, reference)
        inputs["pixel_values"] = reference.pixel_values.to(dtype)
        scale = float(reference.logits.abs().max().clamp_min(1))
        tolerance = LOGIT_TOLERANCE[dtype] * scale
        largest = max(largest, _check_logits(model, inputs, reference, tolerance))
        equal_captions += _check_caption(model, processor, inputs, reference, tolerance)
    return StockComparison(largest, equal_captions, len(images), image_kind)


def load_stock_processor(folder: Path) -> Any:
    """Load the processor of a stock LLaVA folder.

    Raises:
        ValueError: Files are missing, or the processor has no patch_size.
    """
    from transformers import AutoProcessor

    with blame_file(folder):
        processor: Any = AutoProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=False
        )
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(processor.chat_template, dict):
        # There are several named templates. Use the one that Transformers uses by default.
        processor.chat_template = processor.chat_template.get("default")
    if not getattr(processor, "patch_size", None):
        raise ValueError(
            f"{folder}: the processor has no patch_size, so the number of image tokens is unknown. "
            'Add "patch_size", "vision_feature_select_strategy" and "num_additional_image_tokens" (1 for '
            "a vision tower with a CLS token) to processor_config.json."
        )
    return processor


def _process(processor: Any, image: np.ndarray, instruction: str) -> dict[str, torch.Tensor]:
    """Return the model inputs from the stock processor for an image and an instruction."""
    from PIL import Image

    text = _apply_stock_template(processor, instruction)
    bos_token = processor.tokenizer.bos_token
    # Follow `processor.apply_chat_template`: the tokenizer adds a BOS token unless the template has written it.
    has_bos = bool(bos_token) and text.startswith(bos_token)
    return dict(
        processor(
            images=[Image.fromarray(image)],
            text=[text],
            add_special_tokens=not has_bos,
            return_tensors="pt",
        )
    )


def _apply_stock_template(processor: Any, instruction: str) -> str:
    """Render a question about one image with the chat template of a stock processor.

    Templates expect the image in one of three forms: as a part of the content, nowhere (they write the image
    token themselves), or as a token in the text.

    Raises:
        ValueError: The template accepts none of these forms.
    """
    token = processor.image_token
    contents: list[Any] = [
        [{"type": "image"}, {"type": "text", "text": instruction}],
        instruction,
        f"{token}\n{instruction}",
    ]
    problem = f"it does not write {token} exactly once"
    for content in contents:
        try:
            text: str = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                # Fix the date that some templates write, as our prompts do.
                chat_template=FIXED_DATE + processor.chat_template,
                add_generation_prompt=True,
                tokenize=False,
            )
        # A template is code by the author of the checkpoint, so it may raise any error.
        except Exception as error:  # noqa: BLE001
            problem = f"{type(error).__name__}: {error}"
            continue
        # Some templates print a list of parts as Python text ("[{'type': 'text', ...}]"), which also contains the
        # instruction.
        if text.count(token) == 1 and instruction in text and "'type': 'text'" not in text:
            return text
    raise ValueError(
        f"The chat template of the stock model cannot render a question about one image: {problem}."
    )


def _check_prompt(inputs: dict[str, torch.Tensor], image_token: int, reference: Reference) -> None:
    """Raise ValueError if the token ids of the prompt differ from the checkpoint's."""
    input_ids = inputs["input_ids"][0].tolist()
    input_ids = [IMAGE_INDEX if token == image_token else token for token in input_ids]
    if input_ids != reference.input_ids:
        raise ValueError(
            "The prompt of Transformers' LlavaProcessor differs from the checkpoint's: token ids "
            f"{input_ids}, expected {reference.input_ids}. {_NOTHING_WRITTEN}"
        )


def _check_pixels(inputs: dict[str, torch.Tensor], reference: Reference) -> None:
    """Raise ValueError if the pixel values have another shape, or differ by more than the rounding of a resize."""
    if inputs["pixel_values"].shape != reference.pixel_values.shape:
        raise ValueError(
            f"Transformers' LlavaProcessor returns pixel values of {tuple(inputs['pixel_values'].shape)}, "
            f"expected {tuple(reference.pixel_values.shape)}. {_NOTHING_WRITTEN}"
        )
    difference = (inputs["pixel_values"] - reference.pixel_values).abs()
    levels = float((difference / reference.gray_level).max())
    if levels > MAX_GRAY_LEVELS:
        raise ValueError(
            f"The pixel values of Transformers' LlavaProcessor differ by up to {levels:.1f} gray levels from "
            f"the checkpoint's; rounding causes a difference of at most 2. {_NOTHING_WRITTEN}"
        )


def _check_logits(
    model: Any, inputs: dict[str, torch.Tensor], reference: Reference, tolerance: float
) -> float:
    """Return the largest difference of a logit of the first generated token from the checkpoint's.

    Raises:
        ValueError: The difference exceeds the tolerance.
    """
    logits = model(**inputs, logits_to_keep=1).logits[0, -1]
    # Ignore the additional entries of an exported vocabulary, such as the image token.
    difference = logits[: len(reference.logits)] - reference.logits
    largest = float(difference.abs().max())
    if largest > tolerance:
        raise ValueError(
            f"The logits of LLaVA in Transformers differ by up to {largest:.2g} from the checkpoint's; rounding "
            f"explains at most {tolerance:.2g}. Transformers computes this projector or language model differently. "
            f"{_NOTHING_WRITTEN}"
        )
    return largest


def _check_caption(
    model: Any,
    processor: Any,
    inputs: dict[str, torch.Tensor],
    reference: Reference,
    tolerance: float,
) -> bool:
    """Return whether the greedy captions are equal.

    Raises:
        ValueError: At the first difference, the logits of the two tokens differ by more than the
            tolerance; or one caption ends earlier.
    """
    prompt_length = inputs["input_ids"].shape[1]
    generated = model.generate(**inputs, max_new_tokens=CAPTION_LENGTH, do_sample=False)
    caption_ids = generated[0, prompt_length:].tolist()
    if caption_ids == reference.caption_ids:
        return True

    # If one caption is a prefix of the other, one model has stopped earlier. That is an error, not a tie.
    position = _first_difference(caption_ids, reference.caption_ids)
    if position is not None:
        # Compute the logits at the first difference.
        common = torch.tensor([caption_ids[:position]], dtype=torch.long)
        longer = torch.cat([inputs["input_ids"], common], dim=1)
        outputs = model(input_ids=longer, pixel_values=inputs["pixel_values"], logits_to_keep=1)
        logits = outputs.logits[0, -1]
        difference = logits[caption_ids[position]] - logits[reference.caption_ids[position]]
        if difference <= tolerance:
            return False
    generated_text = processor.decode(caption_ids, skip_special_tokens=True)
    expected_text = processor.decode(reference.caption_ids, skip_special_tokens=True)
    raise ValueError(
        f"LLaVA in Transformers generates {generated_text!r}, but the checkpoint generates "
        f"{expected_text!r}. {_NOTHING_WRITTEN}"
    )


def _first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Return the first position with two different tokens; None if one is a prefix of the other."""
    for position, (one, other) in enumerate(zip(first, second)):
        if one != other:
            return position
    return None
