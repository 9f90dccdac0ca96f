"""Caption images three times each: our `generate` against stock LLaVA, the tutorial's loop, or llama.cpp.

    python benchmarks/bench_caption.py [--language-model FOLDER] [--images 32] [--batch 16] [--rounds 2]
    python benchmarks/bench_caption.py --peer llama.cpp [--size 1.7b] [--samples 1]

All sides have the same weights (SmolLM2-135M, downloaded if no folder is given, or random weights in the
shape of SmolLM2-1.7B; a random tower in the shape of CLIP ViT-B/16), images and prompts. The length of each
image's captions is drawn beforehand, and is the same for all sides. Every run is a separate process.

The sides that use Transformers also have the same data type (bfloat16 if it is fast on this machine) and the
same pixels. The tutorial's loop captions one image at a time, and encodes and prefills it again for every
sample. In float32, all these sides must generate the same greedy captions.

In the comparison with llama.cpp, our side is also measured with `--quantize int8`.

llama.cpp's server loads our exported GGUF, as float16 and quantized. Its prompt cache is off, and the samples of
an image are the `n` choices of one request. Several numbers of concurrent requests are tried, and the fastest
is reported. Its time includes a few milliseconds per image for HTTP and for decoding the image. Its captions
cannot be the same as ours, because it has another random number generator, and resizes images differently. But
its prompts must have the same number of positions.

Prints captions per second as ratios, and peak memory; with llama.cpp, the time to the first token too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peer_llama_cpp
import serving
from workload import (
    INSTRUCTION,
    MAX_CAPTION_LENGTH,
    compute_dtype,
    draw_caption_lengths,
    peak_memory,
    run_child,
    stock_projector_weights,
    write_checkpoint,
    write_data,
    write_models,
    write_random_language_model,
)

if TYPE_CHECKING:
    from llava_simplified.model.llava import Llava

TEMPERATURE = 0.7  # the default of `llava caption` for several samples
GREEDY_IMAGES = 8  # images whose greedy captions are compared
FIRST_TOKEN_IMAGES = 5  # images for which the time to the first token is measured
OURS, STOCK, TUTORIAL = "ours", "stock, batched", "the tutorial's loop"
OURS_INT8 = "ours, int8"
TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"
# A side's generate function: (positions of the images, samples per image, temperature) -> token ids of each caption.
Generate = Callable[[list[int], int, float], list[list[int]]]


def build(models: tuple[str, str]) -> Llava:
    """Build a LLaVA model from the folders of a language model and a vision tower, with a random projector."""
    import torch

    from llava_simplified.model.build import build_model
    from llava_simplified.model.config import LlavaConfig

    torch.manual_seed(1)  # every side runs in its own process, and must get the same projector
    dtype = compute_dtype()
    config = LlavaConfig(*models, mm_projector_type="mlp2x_gelu", dtype=dtype)
    return build_model(config).to(getattr(torch, dtype)).eval()


def to_stock(model: Any) -> tuple[Any, int]:
    """Return a `LlavaForConditionalGeneration` with the same weights, and the id of its image token."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    language_model = model.language_model
    tower = model.vision_tower.model
    # Stock LLaVA marks the positions of an image with a token of the vocabulary, so add one.
    image_token = language_model.config.vocab_size
    language_model.resize_token_embeddings(image_token + 1)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_id=image_token,
        vision_feature_layer=-2,  # the hidden state that our tower selects by default
    )
    stock: Any = LlavaForConditionalGeneration(config).to(getattr(torch, compute_dtype()))
    # Replace the random modules of the new model by ours, which have the same classes.
    stock.model.vision_tower = tower
    stock.model.language_model = language_model.model
    stock.lm_head = language_model.lm_head
    weights = stock_projector_weights(model.projector.state_dict())
    stock.model.multi_modal_projector.load_state_dict(weights)
    return stock.eval(), image_token


def make_generate(model: Any, prompt: list[int], pixels: Any, lengths: list[int]) -> Generate:
    """Return a function that captions images with our decoding loop."""
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

    # Our prompts have one placeholder per image, and those of stock LLaVA one per image token.
    image_position = prompt.index(IMAGE_INDEX)
    image_tokens = [image_token] * model.vision_tower.num_tokens
    input_ids = torch.tensor(prompt[:image_position] + image_tokens + prompt[image_position + 1 :])
    stop_ids = model.prompt.stop_ids

    class EndsAtLength(StoppingCriteria):
        """End each caption at the length that was drawn for its image."""

        def __init__(self, positions: list[int], samples: int) -> None:
            # `generate` passes prompt and answer together, so add the length of the prompt.
            limits = torch.tensor([len(input_ids) + lengths[i] for i in positions])
            self.limits = limits.repeat_interleave(samples)

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids.shape[1] >= self.limits

    def cut(ids: list[int], limit: int) -> list[int]:
        """Remove the padding after the end of a caption."""
        for index, token in enumerate(ids[:limit]):
            if token in stop_ids:
                return ids[: index + 1]
        return ids[:limit]

    def generate(positions: list[int], samples: int, temperature: float) -> list[list[int]]:
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            # Transformers' default is top_k=50. Sample from all tokens, as our side does.
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


def caption_all(
    side: str, models: tuple[str, str], folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Measure a side that runs in Python, in this process, which was started for it.

    Returns:
        "rate": captions per second; "memory": peak bytes; "first_token": seconds (only with llama.cpp);
        "prompt_tokens": positions of the prompt; "greedy": captions of the first images (not with llama.cpp).
    """
    import torch

    from llava_simplified.data.images import decode_image
    from llava_simplified.model.int8_linear import quantize_linear_layers
    from llava_simplified.prompt import Message

    model: Any = build(models)
    turns = [Message("user", f"<image>\n{INSTRUCTION}")]
    prompt = model.prompt.render(turns, None).input_ids
    paths = sorted(folder.glob("*.png"))
    images = [model.vision_tower.transform(decode_image(path.read_bytes())) for path in paths]
    pixels = torch.stack(images)
    lengths = draw_caption_lengths(len(paths))
    stock: Any = None
    if side == OURS_INT8:
        quantize_linear_layers(model.language_model)
    if side in (OURS, OURS_INT8):
        generate = make_generate(model, prompt, pixels, lengths)
    else:
        stock, image_token = to_stock(model)
        generate = make_stock_generate(model, stock, image_token, prompt, pixels, lengths)

    generate([0], 1, 0.0)  # warm up
    start = time.perf_counter()
    if side == TUTORIAL:
        # As in the tutorial, generate one sample of one image at a time.
        for position in range(len(paths)):
            for _ in range(args.samples):
                generate([position], 1, TEMPERATURE)
    else:
        for first in range(0, len(paths), args.batch):
            positions = list(range(first, min(first + args.batch, len(paths))))
            generate(positions, args.samples, TEMPERATURE)
    result: dict[str, Any] = {
        "rate": len(paths) * args.samples / (time.perf_counter() - start),
        "memory": peak_memory(os.getpid()),
        # One position of the prompt is the placeholder of the image, which is replaced by its tokens.
        "prompt_tokens": len(prompt) - 1 + model.vision_tower.num_tokens,
    }
    if args.peer == LLAMA_CPP:
        result["first_token"] = measure_first_token(model, prompt, paths)
        return result

    # Compare greedy captions in float32, where rounding rarely changes the most likely token.
    model.float()
    if stock is not None:
        stock.float()
    positions = list(range(min(GREEDY_IMAGES, len(paths))))
    groups = [[position] for position in positions] if side == TUTORIAL else [positions]
    greedy: list[list[int]] = []
    for group in groups:
        greedy += generate(group, 1, 0.0)
    return result | {"greedy": greedy}


def measure_first_token(model: Llava, prompt: list[int], paths: list[Path]) -> float:
    """Return the median seconds from the bytes of an image file to the first token of its caption."""
    import torch

    from llava_simplified.data.images import decode_image
    from llava_simplified.model.generation import DecodingBatch
    from llava_simplified.model.generation_options import GenerationOptions

    seconds = []
    for path in paths[:FIRST_TOKEN_IMAGES]:
        content = path.read_bytes()
        start = time.perf_counter()
        with torch.inference_mode():
            pixels = model.vision_tower.transform(decode_image(content))
            features = model.vision_tower(pixels[None])
            # With a limit of one token, the batch ends after this step, without another forward pass for the token.
            DecodingBatch(model, [prompt], features, GenerationOptions(max_new_tokens=1)).step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# ---- llama.cpp ----


def caption_with_llama_cpp(
    programs: Path, gguf: Path, folder: Path, samples: int, requests: int
) -> dict[str, Any]:
    """Measure llama.cpp with `requests` concurrent requests.

    Returns:
        The same values as `caption_all`, and "requests".
    """
    paths = sorted(folder.glob("*.png"))
    lengths = draw_caption_lengths(len(paths))
    bodies = []
    for path, length in zip(paths, lengths):
        body = serving.make_body(path.read_bytes(), INSTRUCTION, length, samples, TEMPERATURE)
        bodies.append(body | peer_llama_cpp.REQUEST_FIELDS)
    # Every sample of every concurrent request is a sequence of the server.
    command = peer_llama_cpp.server_command(programs, gguf, requests * samples)
    with serving.running_server(command) as server:
        serving.request_captions(server.url, bodies[0] | {"max_tokens": 2})  # warm up
        urls = [server.url] * len(bodies)
        start = time.perf_counter()
        with ThreadPoolExecutor(requests) as pool:
            answers = list(pool.map(serving.request_captions, urls, bodies))
        seconds = time.perf_counter() - start
        # Now that the server is idle, measure the time to the first token of single requests.
        first_tokens = []
        for body in bodies[:FIRST_TOKEN_IMAGES]:
            first_tokens.append(serving.measure_first_token(server.url, body))
    for answer in answers:
        if len(answer.texts) != samples:
            sys.exit(
                f"llama.cpp returned {len(answer.texts)} captions of an image instead of {samples}; "
                "the comparison is not valid"
            )
    return {
        "rate": len(paths) * samples / seconds,
        "memory": server.memory[0],
        "first_token": statistics.median(first_tokens),
        "prompt_tokens": answers[0].prompt_tokens,
        "requests": requests,
    }


def run_llama_cpp(
    programs: Path,
    ggufs: dict[str, Path],
    folder: Path,
    args: argparse.Namespace,
    best: dict[str, dict[str, Any]],
) -> None:
    """Measure llama.cpp in every format, and keep the fastest runs in `best`.

    The first call tries all numbers of concurrent requests. Later calls repeat only the fastest number.
    """
    for name, gguf in ggufs.items():
        side = f"{LLAMA_CPP} {name}"
        # Every run of llama.cpp loads the model again, so do not repeat the slower numbers.
        numbers = [best[side]["requests"]] if side in best else args.requests
        for requests in numbers:
            run = caption_with_llama_cpp(programs, gguf, folder, args.samples, requests)
            keep_best(best, side, run)


# ---- the table ----


def keep_best(best: dict[str, dict[str, Any]], side: str, run: dict[str, Any]) -> None:
    """Store a run of a side in `best` if it is the fastest one so far."""
    print(f"{side}: {run['rate']:.2f} captions/s", file=sys.stderr, flush=True)
    if side not in best or run["rate"] > best[side]["rate"]:
        best[side] = run


def run_sides(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the fastest run of each side."""
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        language_model = args.language_model
        if args.size == "1.7b":
            language_model = write_random_language_model(root, language_model)
        models = write_models(root, language_model)
        folder = root / "images"
        folder.mkdir()
        write_data(folder, args.images, 1)
        sides = [OURS, STOCK, TUTORIAL] if args.peer == TRANSFORMERS else [OURS, OURS_INT8]
        ggufs: dict[str, Path] = {}
        if args.peer == LLAMA_CPP:
            peer_llama_cpp.build_llama_cpp(args.llama_cpp)
            version = peer_llama_cpp.server_version(args.llama_cpp)
            print(f"llama.cpp {version}")
            checkpoint = write_checkpoint(root, models)
            ggufs = peer_llama_cpp.convert_checkpoint(args.llama_cpp, checkpoint, root / "gguf")
        print(
            f"{args.images} images, {args.samples} sample(s) each, batches of {args.batch}, "
            f"{compute_dtype()}, {args.size}",
            flush=True,
        )
        arguments = ["--batch", args.batch, "--samples", args.samples, "--peer", args.peer]
        # Alternate between the sides, so that a busy period of the machine affects all of them.
        for _ in range(args.rounds):
            for side in sides:
                run_child(__file__, *arguments, "--run", side, *models, folder, name=side)
                keep_best(best, side, json.loads((folder / "result.json").read_text()))
            run_llama_cpp(args.llama_cpp, ggufs, folder, args, best)
    return best


def describe_run(run: dict[str, Any], ours: dict[str, Any]) -> str:
    """Return the figures of the fastest run of a side as text."""
    text = f"{run['rate']:8.2f} captions/s   ours is {ours['rate'] / run['rate']:5.2f}x   "
    text += f"memory {run['memory'] / 1e9:.2f} GB"
    if "first_token" in run:
        text += f"   first token {run['first_token']:.3f} s"
    if "requests" in run:
        text += f"   {run['requests']} request(s) at a time"
    return text


def main() -> None:
    """Run the benchmark, or one side of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", type=Path, help="Folder of SmolLM2-135M-Instruct")
    parser.add_argument(
        "--size",
        choices=["135m", "1.7b"],
        default="135m",
        help="Parameters of the language model; 1.7b has random weights (default: %(default)s)",
    )
    parser.add_argument("--images", type=int, default=32, help="Number of images")
    parser.add_argument("--samples", type=int, default=3, help="Captions per image")
    parser.add_argument("--batch", type=int, default=16, help="Images per batch")
    parser.add_argument(
        "--rounds", type=int, default=2, help="Runs of each side; the fastest is reported"
    )
    parser.add_argument(
        "--peer",
        choices=[TRANSFORMERS, LLAMA_CPP],
        default=TRANSFORMERS,
        help="What to compare with (default: %(default)s)",
    )
    parser.add_argument(
        "--requests",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="Numbers of concurrent requests to llama.cpp to try; the fastest is reported (default: %(default)s)",
    )
    peer_llama_cpp.add_folder_option(parser)
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        side, language_model, tower, folder = args.run
        result = caption_all(side, (language_model, tower), Path(folder), args)
        (Path(folder) / "result.json").write_text(json.dumps(result))
        return
    best = run_sides(args)
    ours = best[OURS]
    for side, run in best.items():
        print(f"{side:22}{describe_run(run, ours)}")
        if run["prompt_tokens"] != ours["prompt_tokens"]:
            sys.exit(
                f"{side}: the prompts have {run['prompt_tokens']} positions, but the prompts of our side have "
                f"{ours['prompt_tokens']}; the comparison is not valid"
            )
        if run.get("greedy") != ours.get("greedy") and args.peer == TRANSFORMERS:
            sys.exit(f"{side}: the greedy captions differ from ours; the comparison is not valid")


if __name__ == "__main__":
    main()
