"""Caption images three times each: our `generate`, stock LLaVA's batched `generate`, the tutorial's loop.

    python benchmarks/bench_caption.py [--language-model FOLDER] [--images 32] [--batch 16] [--rounds 2]

All sides have the same weights (SmolLM2-135M, downloaded if no folder is given, and a random tower in the
shape of CLIP ViT-B/16), the same data type (bfloat16 where this machine is fast in it), pixels and prompts.
The length of each image's captions is drawn beforehand, and is the same for all sides. The tutorial's loop
captions one image at a time, and encodes and prefills it again for every sample. Every run is a separate
process.

Prints captions per second as ratios, and peak memory. The greedy captions of all sides must be the same in
float32.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workload import (
    INSTRUCTION,
    MAX_CAPTION_LENGTH,
    compute_dtype,
    draw_caption_lengths,
    run_child,
    stock_projector_weights,
    write_data,
    write_models,
)

if TYPE_CHECKING:
    from llava_simplified.model.llava import Llava

SAMPLES_PER_IMAGE = 3
TEMPERATURE = 0.7
GREEDY_IMAGES = 8  # images whose greedy captions are compared
OURS, STOCK, TUTORIAL = "ours", "stock, batched", "the tutorial's loop"
SIDES = (OURS, STOCK, TUTORIAL)
# (positions of the images, samples per image, temperature) -> token ids of each caption
Generate = Callable[[list[int], int, float], list[list[int]]]


def build(models: tuple[str, str]) -> Llava:
    """Build a model of a language model and a vision tower, with a random projector."""
    import torch

    from llava_simplified.model.build import build_model
    from llava_simplified.model.config import LlavaConfig

    torch.manual_seed(1)
    dtype = compute_dtype()
    config = LlavaConfig(*models, mm_projector_type="mlp2x_gelu", dtype=dtype)
    return build_model(config).to(getattr(torch, dtype)).eval()


def to_stock(model: Any) -> tuple[Any, int]:
    """Return the same weights as a `LlavaForConditionalGeneration`, and its image token."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    language_model = model.language_model
    tower = model.vision_tower.model
    image_token = language_model.config.vocab_size
    language_model.resize_token_embeddings(image_token + 1)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_id=image_token,
        vision_feature_layer=-2,
    )
    stock: Any = LlavaForConditionalGeneration(config).to(getattr(torch, compute_dtype()))
    stock.model.vision_tower = tower
    stock.model.language_model = language_model.model
    stock.lm_head = language_model.lm_head
    weights = stock_projector_weights(model.projector.state_dict())
    stock.model.multi_modal_projector.load_state_dict(weights)
    return stock.eval(), image_token


def make_generate(model: Any, prompt: list[int], pixels: Any, lengths: list[int]) -> Generate:
    """Return our side."""
    import torch

    from llava_simplified.model.generation import DecodingBatch
    from llava_simplified.model.generation_options import GenerationOptions

    def generate(positions: list[int], samples: int, temperature: float) -> list[list[int]]:
        options = []
        for position in positions:
            option = GenerationOptions(
                max_new_tokens=lengths[position],
                temperature=temperature,
                num_return_sequences=samples,
                seed=0,
            )
            options.append(option)
        with torch.inference_mode():
            features = model.vision_tower(pixels[positions])
            batch = DecodingBatch(model, [prompt] * len(positions), features, options)
        while batch.active:
            batch.step()
        return list(batch.generated_ids.values())

    return generate


def make_stock_generate(
    model: Any, stock: Any, image_token: int, prompt: list[int], pixels: Any, lengths: list[int]
) -> Generate:
    """Return a function that captions images with stock LLaVA."""
    import torch
    from transformers import StoppingCriteria

    from llava_simplified.prompt import IMAGE_INDEX

    place = prompt.index(IMAGE_INDEX)
    image_tokens = [image_token] * model.vision_tower.num_tokens
    input_ids = torch.tensor(prompt[:place] + image_tokens + prompt[place + 1 :])
    stop_ids = model.prompt.stop_ids

    class EndsAtLength(StoppingCriteria):
        """End each caption at the length that was drawn for its image."""

        def __init__(self, positions: list[int], samples: int) -> None:
            limits = torch.tensor([len(input_ids) + lengths[i] for i in positions])
            self.limits = limits.repeat_interleave(samples)

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids.shape[1] >= self.limits

    def cut(ids: list[int], limit: int) -> list[int]:
        """Remove the padding behind the end of a caption."""
        for index, token in enumerate(ids[:limit]):
            if token in stop_ids:
                return ids[: index + 1]
        return ids[:limit]

    def generate(positions: list[int], samples: int, temperature: float) -> list[list[int]]:
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
        with torch.inference_mode():
            normalized = model.vision_tower.transform.normalize(pixels[positions])
            output = stock.generate(
                input_ids=input_ids.expand(len(positions), -1),
                attention_mask=torch.ones(len(positions), len(input_ids), dtype=torch.long),
                pixel_values=normalized.to(stock.dtype),
                max_new_tokens=MAX_CAPTION_LENGTH,
                num_return_sequences=samples,
                stopping_criteria=[EndsAtLength(positions, samples)],
                pad_token_id=model.prompt.end_id,
                eos_token_id=stop_ids,
                **sampling,
            )
        captions = []
        for row, ids in enumerate(output[:, len(input_ids) :].tolist()):
            captions.append(cut(ids, lengths[positions[row // samples]]))
        return captions

    return generate


def caption_all(side: str, models: tuple[str, str], folder: Path, batch: int) -> dict[str, Any]:
    """Measure one side, in a separate process.

    Returns:
        "rate": captions per second; "memory": peak bytes; "greedy": captions of the first images.
    """
    import torch

    from llava_simplified.data.images import decode_image
    from llava_simplified.prompt import Message

    model: Any = build(models)
    turns = [Message("user", f"<image>\n{INSTRUCTION}")]
    prompt = model.prompt.render(turns, None).input_ids
    paths = sorted(folder.glob("*.png"))
    images = [model.vision_tower.transform(decode_image(path.read_bytes())) for path in paths]
    pixels = torch.stack(images)
    lengths = draw_caption_lengths(len(paths))
    stock: Any = None
    if side == OURS:
        generate = make_generate(model, prompt, pixels, lengths)
    else:
        stock, image_token = to_stock(model)
        generate = make_stock_generate(model, stock, image_token, prompt, pixels, lengths)

    generate([0], 1, 0.0)  # warm up
    start = time.perf_counter()
    if side == TUTORIAL:
        for position in range(len(paths)):
            for _ in range(SAMPLES_PER_IMAGE):
                generate([position], 1, TEMPERATURE)
    else:
        for first in range(0, len(paths), batch):
            positions = list(range(first, min(first + batch, len(paths))))
            generate(positions, SAMPLES_PER_IMAGE, TEMPERATURE)
    rate = len(paths) * SAMPLES_PER_IMAGE / (time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    model.float()
    if stock is not None:
        stock.float()
    positions = list(range(min(GREEDY_IMAGES, len(paths))))
    groups = [[position] for position in positions] if side == TUTORIAL else [positions]
    greedy: list[list[int]] = []
    for group in groups:
        greedy += generate(group, 1, 0.0)
    return {"rate": rate, "memory": memory, "greedy": greedy}


def run_sides(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the best run of each side."""
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        models = write_models(root, args.language_model)
        folder = root / "images"
        folder.mkdir()
        write_data(folder, args.images, 1)
        print(
            f"{args.images} images, {SAMPLES_PER_IMAGE} samples each, batches of {args.batch}, "
            f"{compute_dtype()}",
            flush=True,
        )
        # The sides take turns, so that a busy moment of the machine does not hit one of them only.
        for _ in range(args.rounds):
            for side in SIDES:
                words = ["--batch", args.batch, "--run", side, *models, folder]
                run_child(__file__, *words, name=side)
                run = json.loads((folder / "result.json").read_text())
                if side not in best or run["rate"] > best[side]["rate"]:
                    best[side] = run
    return best


def main() -> None:
    """Run the benchmark, or one side of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", type=Path, help="Folder of SmolLM2-135M-Instruct")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        side, language_model, tower, folder = args.run
        result = caption_all(side, (language_model, tower), Path(folder), args.batch)
        (Path(folder) / "result.json").write_text(json.dumps(result))
        return
    best = run_sides(args)
    for side, run in best.items():
        ratio = best[OURS]["rate"] / run["rate"]
        print(
            f"{side:22}{run['rate']:8.2f} captions/s   ours is {ratio:5.2f}x   "
            f"memory {run['memory'] / 1e9:.2f} GB"
        )
        if run["greedy"] != best[OURS]["greedy"]:
            sys.exit(f"{side}: its greedy captions differ from ours; the comparison is not valid")


if __name__ == "__main__":
    main()
