"""Caption pictures three times each: `generate` here against the tutorial's loop and stock LLaVA's batched `generate`.

    python benchmarks/bench_caption.py [--language-model FOLDER] [--images 48] [--batch 16] [--rounds 2]

The same weights on all sides (SmolLM2-135M, which is fetched where no folder is given, and a random tower of CLIP
ViT-B/16's shape), bfloat16 where the machine is fast in it, the same pixels and prompts. A random projector makes the model
ramble, so the length at which a picture's captions end is drawn beforehand, the same for all sides, as the lengths of
Conceptual Captions are: 6 to 37 tokens, 12 in the mean. The tutorial's loop takes a picture at a time, and encodes and
prefills it anew for every trial. Every run is a process of its own.
Prints captions per second as ratios, and peak memory; the greedy captions of all sides, in float32, must be the same.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_train import number_type, write_data, write_models

TRIALS = 3
LONGEST = 37  # tokens
GREEDY = 8  # pictures whose greedy captions are compared
SIDES = ("ours", "stock, batched", "the tutorial's loop")


def build(models: tuple[str, str]) -> Any:
    import torch

    from llava_simplified.model.build import build_model
    from llava_simplified.model.config import LlavaConfig

    torch.manual_seed(1)
    dtype = number_type()
    architecture = LlavaConfig(*models, mm_projector_type="mlp2x_gelu", dtype=dtype)
    return build_model(architecture).to(getattr(torch, dtype)).eval()


def stock_model(model: Any) -> tuple[Any, int]:
    """The same weights as `LlavaForConditionalGeneration`."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text, tower = model.language_model, model.vision_tower.model
    image_token = text.config.vocab_size
    text.resize_token_embeddings(image_token + 1)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text.config,
        image_token_id=image_token,
        vision_feature_layer=-2,
    )
    stock = LlavaForConditionalGeneration(config).to(getattr(torch, number_type()))
    stock.model.vision_tower, stock.model.language_model, stock.lm_head = (
        tower,
        text.model,
        text.lm_head,
    )
    names = {"0.": "linear_1.", "2.": "linear_2."}
    weights = {names[k[:2]] + k[2:]: v for k, v in model.projector.state_dict().items()}
    stock.model.multi_modal_projector.load_state_dict(weights)
    return stock.eval(), image_token


def lengths(count: int) -> list[int]:
    """Tokens of the captions of each picture: the logarithm's mean and deviation are those of Conceptual Captions."""
    draw = random.Random(0)
    return [min(max(round(draw.lognormvariate(2.44, 0.36)), 6), LONGEST) for _ in range(count)]


def caption_all(side: str, models: tuple[str, str], folder: Path, batch: int) -> dict[str, Any]:
    """In a process of its own: captions per second, peak memory, and the first pictures' greedy captions."""
    import torch
    from transformers import StoppingCriteria

    from llava_simplified.data.images import decode_image
    from llava_simplified.model.generation import DecodingBatch
    from llava_simplified.model.generation_options import GenerationOptions
    from llava_simplified.prompt import IMAGE_INDEX, Message

    model = build(models)
    prompt = model.prompt.render(
        [Message("user", "<image>\nGenerate a caption of this image:")], None
    ).input_ids
    names = sorted(folder.glob("*.png"))
    pixels = torch.stack(
        [model.vision_tower.transform(decode_image(path.read_bytes())) for path in names]
    )
    ends = lengths(len(names))
    if side != "ours":
        stock, image_token = stock_model(model)
        place = prompt.index(IMAGE_INDEX)
        ids = torch.tensor(
            prompt[:place] + [image_token] * model.vision_tower.num_tokens + prompt[place + 1 :]
        )

    class EndsAt(StoppingCriteria):
        """Each row ends at its picture's length."""

        def __init__(self, places: list[int], trials: int) -> None:
            self.limits = torch.tensor(
                [len(ids) + ends[place] for place in places]
            ).repeat_interleave(trials)

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids.shape[1] >= self.limits

    def ours(places: list[int], trials: int, temperature: float) -> list[list[int]]:
        options = [
            GenerationOptions(ends[p], temperature=temperature, num_return_sequences=trials, seed=0)
            for p in places
        ]
        with torch.inference_mode():
            decoding = DecodingBatch(
                model, [prompt] * len(places), model.vision_tower(pixels[places]), options
            )
        while decoding.active:
            decoding.step()
        return list(decoding.generated_ids.values())

    def theirs(places: list[int], trials: int, temperature: float) -> list[list[int]]:
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0}
            if temperature
            else {"do_sample": False}
        )
        with torch.inference_mode():
            out = stock.generate(
                input_ids=ids.expand(len(places), -1),
                attention_mask=torch.ones(len(places), len(ids), dtype=torch.long),
                pixel_values=model.vision_tower.transform.normalize(pixels[places]).to(stock.dtype),
                max_new_tokens=LONGEST,
                num_return_sequences=trials,
                stopping_criteria=[EndsAt(places, trials)],
                pad_token_id=model.prompt.end_id,
                eos_token_id=model.prompt.stop_ids,
                **sampling,
            )
        rows = out[:, len(ids) :].tolist()
        stops = [
            next((i + 1 for i, token in enumerate(row) if token in model.prompt.stop_ids), LONGEST)
            for row in rows
        ]
        return [row[: min(stops[i], ends[places[i // trials]])] for i, row in enumerate(rows)]

    run = ours if side == "ours" else theirs
    run([0], 1, 0.0)  # warm
    start = time.perf_counter()
    if side == "the tutorial's loop":
        for index in range(len(names)):
            for _ in range(TRIALS):
                run([index], 1, 0.7)
    else:
        for first in range(0, len(names), batch):
            run(list(range(first, min(first + batch, len(names)))), TRIALS, 0.7)
    rate = len(names) * TRIALS / (time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    model.float()
    if side != "ours":
        stock.float()
    shown = list(range(min(GREEDY, len(names))))
    one_by_one = side == "the tutorial's loop"
    greedy = [
        row
        for places in ([[i] for i in shown] if one_by_one else [shown])
        for row in run(places, 1, 0.0)
    ]
    return {"rate": rate, "memory": memory, "greedy": greedy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", type=Path, help="folder of SmolLM2-135M-Instruct")
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
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        models = write_models(root, args.language_model)
        folder = root / "pictures"
        folder.mkdir()
        write_data(folder, args.images, 1)
        print(
            f"{args.images} pictures, {TRIALS} samples each, batches of {args.batch}, {number_type()}",
            flush=True,
        )
        results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side in SIDES:
                words = [
                    sys.executable,
                    __file__,
                    "--batch",
                    args.batch,
                    "--run",
                    side,
                    *models,
                    folder,
                ]
                done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
                results[side].append(json.loads((folder / "result.json").read_text()))
    best = {side: max(runs, key=lambda run: run["rate"]) for side, runs in results.items()}
    for side, run in best.items():
        print(
            f"{side:22}{run['rate']:8.2f} captions/s   ours is {best['ours']['rate'] / run['rate']:5.2f}x   "
            f"memory {run['memory'] / 1e9:.2f} GB"
        )
        if run["greedy"] != best["ours"]["greedy"]:
            sys.exit(
                f"{side}: other greedy captions than ours: the sides do not compute the same thing"
            )


if __name__ == "__main__":
    main()
