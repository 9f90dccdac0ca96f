"""Write docs/tutorial.md and its figures: one drawing of the demo, from its bytes to the gradient and to a caption.

    make docs          # after `make demo`; or: python docs/make_tutorial.py --checkpoint output/demo/model

The text is in docs/tutorial.md.j2. All its numbers come from running the code, so that the text cannot claim what the
code does not do. Only the exercises contain a few rounded numbers, because they take minutes to run.
"""

from __future__ import annotations

import argparse
import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionConfig

from llava_simplified.data.collate import Collator, Example
from llava_simplified.data.dataset import CaptionDataset
from llava_simplified.data.images import decode_image, read_image_bytes
from llava_simplified.data.records import open_records
from llava_simplified.demo.assets import fetch
from llava_simplified.model.generation import DecodingBatch
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.language_model import shared_prefix_mask
from llava_simplified.model.llava import Llava
from llava_simplified.model.vision import VisionTower
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX
from llava_simplified.serve.attention_map import WORD, attention_map

DOCS = Path(__file__).parent
FIGURES = DOCS / "img"
IMAGE_COLOR, TEXT_COLOR, TRAINED_COLOR = "#ffd8a8", "#e9ecef", "#b2f2bb"
# Without this, matplotlib logs that tokens such as "1" look like numbers.
logging.getLogger("matplotlib.category").setLevel(logging.ERROR)


# ---- run the code ----


def follow_image(checkpoint: Path, cache_dir: Path | None, image: str) -> dict[str, Any]:
    """Run every part of the code on one sample, and return the values that the template shows."""
    torch.manual_seed(0)
    assets = fetch(cache_dir)
    model = Llava.from_pretrained(checkpoint, device="cpu", dtype="float32", trainable=True)
    records = open_records(assets.val_json)
    record = next(record for record in records if record.images == (image,))

    # 1 to 3: bytes -> pixels -> patch features -> image tokens
    data = read_image_bytes(image, assets.images)
    decoded = decode_image(data)
    pixels = model.vision_tower.transform(decoded)
    features = model.vision_tower(pixels[None])
    image_tokens = model.projector(features)
    embedding_table = model.language_model.get_input_embeddings().weight

    # 4 and 5: text -> ids and labels -> one sequence with the image tokens
    dataset = CaptionDataset(records, model.prompt, assets.images, model.vision_tower.transform)
    example = dataset.tokenize(record, record.responses)
    example.pixel_values = pixels[None]
    batch = Collator(model.vision_tower.num_tokens, model.prompt.end_id)([example])
    batch.pop("metadata")
    embeds = model.splice(batch["input_ids"], features)
    tokens = describe_tokens(model, example)
    input_ids = batch["input_ids"][0].tolist()
    logit_positions = batch["logit_positions"].tolist()

    # 6 and 7: loss and gradient
    losses = compare_losses(model, batch)
    output = model(**batch)
    output.loss.backward()

    # 8: the caption
    steps, generated = generate_caption(model, record, features)
    grids = attention_map(model, record.turns[-1].content, [assets.images / image], generated)
    grids = grids[:, 0].numpy()

    # 9: a shared prefix of four tokens with two captions of two tokens
    position_ids, mask = share_prefix()

    # the same sample with CLIP ViT-B/16: the shapes are known without the weights
    clip_tower = VisionTower.from_config(
        CLIPVisionConfig(image_size=224, patch_size=16),
        replace(model.vision_tower.transform, resize=224, crop=(224, 224)),
        select_layer=-2,
    )
    clip_batch = Collator(clip_tower.num_tokens, model.prompt.end_id)([example])

    resized = pixels.permute(1, 2, 0).numpy()
    draw_patches(decoded, resized, model.vision_tower.grid[0], clip_tower.grid[0])
    draw_sequence(tokens, input_ids, logit_positions)
    draw_mask(mask.numpy())
    draw_attention(resized, WORD.findall(generated), grids)

    files = list_files(checkpoint)
    return {
        "image": image,
        "caption": record.responses[0],
        "bytes": len(data),
        "decoded": decoded.shape,
        "pixels": tuple(pixels.shape),
        "features": tuple(features.shape),
        "count": features.shape[1],
        "side": int(features.shape[1] ** 0.5),
        "layers": list(model.vision_tower.select_layers),
        "matrices": " and ".join(
            str(tuple(p.shape)) for p in model.projector.parameters() if p.dim() == 2
        ),
        "image_tokens": tuple(image_tokens.shape),
        "deviation": (float(image_tokens.detach().std()), float(embedding_table.detach().std())),
        "tokens": tokens,
        "trained": sum(is_trained for *_, is_trained in tokens),
        "input_ids": input_ids,
        "embeds": tuple(embeds.shape),
        "length": embeds.shape[1],
        "splice_code": splice_code(),
        "logit_positions": logit_positions,
        "logits": tuple(output.logits.shape),
        "losses": losses,
        "loss": output.loss.item(),
        "gradients": describe_gradients(model),
        "steps": steps,
        "generated": generated,
        "position_ids": " ".join(map(str, position_ids)),
        "files": files,
        "saved": round(sum(size for _, size in files) / 1e6),
        "millions": count_millions(model),
        "clip": {
            "tokens": clip_tower.num_tokens,
            "width": clip_tower.width,
            "grid": clip_tower.grid[0],
            "length": clip_batch["input_ids"].shape[1],
            "logit_positions": clip_batch["logit_positions"].tolist(),
        },
        "image_index": IMAGE_INDEX,
        "ignore_index": IGNORE_INDEX,
    }


def describe_tokens(model: Llava, example: Example) -> list[tuple[str, int, bool]]:
    """Return (token, id, whether it is trained) for each token of an example."""
    rows = []
    for token_id, label in zip(example.input_ids, example.labels):
        if token_id == IMAGE_INDEX:
            token = "<image>"
        else:
            [token] = model.tokenizer.convert_ids_to_tokens([token_id])
        rows.append((token, token_id, label != IGNORE_INDEX))
    return rows


def compare_losses(model: Llava, batch: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return (token, loss without the adapter, loss with it) for each trained token."""

    @torch.no_grad()
    def losses() -> list[float]:
        logits = model(**batch).logits
        return cross_entropy(logits, batch["labels"], reduction="none").tolist()

    with model.language_model.disable_adapter():
        without_adapter = losses()
    tokens = model.tokenizer.convert_ids_to_tokens(batch["labels"].tolist())
    return list(zip(tokens, without_adapter, losses()))


def describe_gradients(model: Llava) -> list[tuple[str, int, str]]:
    """Return (part, number of tensors, norm of the gradient) for each part of the model."""
    parts: dict[str, list[torch.Tensor | None]] = {
        "projector": [],
        "LoRA adapter": [],
        "vision tower": [],
        "language model": [],
    }
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            part = "LoRA adapter"
        else:
            part = name.partition(".")[0].replace("_", " ")
        parts[part].append(parameter.grad)
    rows = []
    for part, gradients in parts.items():
        norms = [float(gradient.norm()) for gradient in gradients if gradient is not None]
        total = "none: frozen"
        if norms:
            # The norm of all gradients together is the norm of their norms.
            total = f"{np.linalg.norm(norms):.3f}"
        rows.append((part, len(gradients), total))
    return rows


def generate_caption(
    model: Llava, record: Any, features: torch.Tensor
) -> tuple[list[tuple[str, list[tuple[str, float]]]], str]:
    """Generate a caption greedily.

    Returns:
        For each step the generated token and the three most likely ones with their probabilities; and the caption.
    """
    prompt = model.prompt.render(record.turns, None).input_ids
    options = GenerationOptions(max_new_tokens=24)
    decoding = DecodingBatch(model, [prompt], features.detach(), options)
    to_tokens = model.tokenizer.convert_ids_to_tokens
    steps = []
    while decoding.active:
        # Read the logits before `step` chooses the token.
        best = decoding._logits[0].softmax(-1).topk(3)
        [(_, token_id)] = decoding.step()
        [token] = to_tokens([token_id])
        candidates = zip(to_tokens(best.indices.tolist()), best.values.tolist())
        steps.append((token, list(candidates)))
    return steps, model.prompt.decode(decoding.generated_ids[0])


def share_prefix() -> tuple[list[int], torch.Tensor]:
    """Return position ids and attention mask of a prompt of four tokens with two captions of two tokens each."""
    # The token ids do not matter. Branch 0 is the prompt, whose placeholder becomes two image tokens.
    example = Example(
        input_ids=[7, IMAGE_INDEX, 8, 1, 2, 3, 4],
        labels=[IGNORE_INDEX] * 3 + [1, 2, 3, 4],
        branches=[0, 0, 0, 1, 1, 2, 2],
    )
    batch = Collator(tokens_per_image=2, pad_token_id=0)([example])
    mask = shared_prefix_mask(batch["segment_ids"], batch["branch_ids"], batch["position_ids"])
    return batch["position_ids"][0].tolist(), mask[0, 0]


def list_files(checkpoint: Path) -> list[tuple[str, int]]:
    """Return the files of a checkpoint with their sizes, without the log of the run."""
    files = []
    for path in sorted(checkpoint.rglob("*")):
        belongs_to_log = "train" in path.name or path.parent.name == "eval_captions"
        if path.is_file() and not belongs_to_log:
            files.append((path.relative_to(checkpoint).as_posix(), path.stat().st_size))
    return files


def count_millions(model: Llava) -> dict[str, str]:
    """Return the number of parameters of each part, as text."""
    counts = {"projector": 0, "tower": 0, "language model": 0, "adapter": 0}
    names = {
        "projector": "projector",
        "vision_tower": "tower",
        "language_model": "language model",
    }
    for name, parameter in model.named_parameters():
        part = "adapter" if "lora_" in name else names[name.partition(".")[0]]
        counts[part] += parameter.numel()
    return {part: f"{count / 1e6:.1f} million" for part, count in counts.items()}


def splice_code() -> str:
    """Return the four statements of `Llava.splice` that do the work, from the code itself."""
    beginnings = ("is_image =", "embeds =", "image_tokens = self", "spliced =")
    lines = [line.strip() for line in inspect.getsource(Llava.splice).splitlines()]
    statements = [line for line in lines if line.startswith(beginnings)]
    if len(statements) != len(beginnings):
        raise RuntimeError(
            "Llava.splice does not contain the statements in `beginnings`. Adapt the list in `splice_code`."
        )
    return "\n".join(statements)


# ---- draw the figures ----


def save_figure(name: str) -> None:
    """Save the current figure in docs/img with a palette of 256 colors, which keeps the file small."""
    FIGURES.mkdir(exist_ok=True)
    path = FIGURES / name
    plt.savefig(path, dpi=110, bbox_inches="tight")
    plt.close()
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def draw_patches(decoded: np.ndarray, resized: np.ndarray, grid: int, clip_grid: int) -> None:
    """Draw the decoded image, and the resized one under the grids of the demo's tower and of CLIP ViT-B/16."""
    panels = [
        (decoded, 0, f"decoded: {decoded.shape[0]} x {decoded.shape[1]}"),
        (resized, grid, f"the demo's tower: {grid} x {grid}"),
        (resized, clip_grid, f"CLIP ViT-B/16: {clip_grid} x {clip_grid}"),
    ]
    _, axes = plt.subplots(1, len(panels), figsize=(9, 3.3))
    for axis, (image, lines, title) in zip(axes, panels):
        axis.imshow(image)
        axis.set_title(title, fontsize=10)
        axis.set(xticks=[], yticks=[])
        # matplotlib puts the center of the first pixel at 0, so its edge is at -0.5.
        for line in range(1, lines):
            axis.axhline(line * len(image) / lines - 0.5, color="#e03131", lw=0.8)
            axis.axvline(line * len(image) / lines - 0.5, color="#e03131", lw=0.8)
    save_figure("patches.png")


def draw_boxes(axis: Axes, row: float, texts: Sequence[str], colors: Sequence[str]) -> None:
    """Draw a row of boxes, one per token."""
    for column, (text, color) in enumerate(zip(texts, colors)):
        box = plt.Rectangle(
            (column + 0.04, row), 0.92, 0.8, facecolor=color, edgecolor="#868e96", lw=0.6
        )
        axis.add_patch(box)
        axis.text(
            column + 0.5,
            row + 0.4,
            text,
            ha="center",
            va="center",
            fontsize=5.5 if len(text) > 9 else 7,
            rotation=90 if len(text) > 3 else 0,
        )


def draw_sequence(
    tokens: Sequence[tuple[str, int, bool]], input_ids: list[int], logit_positions: Sequence[int]
) -> None:
    """Draw the ids, the sequence after the splice, and each target under the position that predicts it."""
    image_place = [token_id for _, token_id, _ in tokens].index(IMAGE_INDEX)
    num_image_tokens = input_ids.count(IMAGE_INDEX)
    # Byte-level tokenizers write a space as Ġ and a line break as Ċ.
    names = [word.replace("Ġ", "").replace("Ċ", "line") for word, _, _ in tokens]
    spliced = names[:image_place] + ["image"] * num_image_tokens + names[image_place + 1 :]

    name_colors = [TEXT_COLOR] * len(names)
    name_colors[image_place] = IMAGE_COLOR
    spliced_colors = [TEXT_COLOR] * len(spliced)
    for place in range(image_place, image_place + num_image_tokens):
        spliced_colors[place] = IMAGE_COLOR
    targets = [""] * len(spliced)
    # Each target is the token after the position that predicts it.
    for position in logit_positions:
        targets[position] = spliced[position + 1]
    target_colors = [TRAINED_COLOR if target else "white" for target in targets]

    figure, axis = plt.subplots(figsize=(7.2, 3.2))
    figure.subplots_adjust(0, 0, 1, 1)
    draw_boxes(axis, 4, names, name_colors)
    draw_boxes(axis, 2, spliced, spliced_colors)
    draw_boxes(axis, 0, targets, target_colors)
    for side in (0, 1):  # from the placeholder to the image tokens that replace it
        below = image_place + side * num_image_tokens
        axis.plot([image_place + side, below], [4, 2.8], color="#f08c00", lw=1)
    for row, title in ((4.4, "input_ids"), (2.4, "after the splice"), (0.4, "target")):
        axis.text(-0.3, row, title, ha="right", va="center", fontsize=9)
    axis.set(xlim=(-4, len(spliced)), ylim=(-0.1, 5))
    axis.axis("off")
    save_figure("sequence.png")


def draw_mask(mask: np.ndarray) -> None:
    """Draw the attention mask of a shared prefix."""
    names = ["prompt", "image", "image", "prompt", "a 1", "a 2", "b 1", "b 2"]
    ticks = range(len(names))
    edges = np.arange(len(names) + 1) - 0.5
    kind_of_column = np.where(np.arange(len(mask)) < 4, 1, 2)  # 1: prefix, 2: caption
    colors = np.where(mask, kind_of_column[None, :], 0)
    _, axis = plt.subplots(figsize=(3.4, 3.4))
    palette = matplotlib.colors.ListedColormap(["white", IMAGE_COLOR, TRAINED_COLOR])
    axis.imshow(colors, cmap=palette)
    axis.set_xticks(ticks, names, rotation=90, fontsize=8)
    axis.set_yticks(ticks, names, fontsize=8)
    axis.set_xticks(edges, minor=True)
    axis.set_yticks(edges, minor=True)
    axis.grid(which="minor", color="#ced4da", lw=0.6)
    axis.tick_params(which="both", length=0)
    axis.set_title("each row attends to the colored columns", fontsize=9)
    save_figure("mask.png")


def draw_attention(image: np.ndarray, words: Sequence[str], grids: np.ndarray) -> None:
    """Draw, for each word, where the model attended more (red) or less (blue) than on average over the words.

    The average is subtracted because some locations, often corners, get attention from every word.
    """
    differences = grids - grids.mean(0)
    limit = abs(differences).max()
    extent = (0, 1, 0, 1)
    _, axes = plt.subplots(1, len(words), figsize=(1.7 * len(words), 2.2), squeeze=False)
    for axis, word, difference, grid in zip(axes[0], words, differences, grids):
        axis.imshow(image, extent=extent)
        axis.imshow(difference, extent=extent, cmap="bwr", alpha=0.45, vmin=-limit, vmax=limit)
        axis.set_title(f"{word.strip()}\n{grid.sum():.0%}", fontsize=8)
        axis.set(xticks=[], yticks=[])
    save_figure("attention.png")


# ---- write the page ----


def code_cell(text: str) -> str:
    """Return text as code in a table cell, where a bar would end the cell."""
    if "|" not in text:
        return f"`{text}`"
    escaped = text.replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")
    return f"<code>{escaped}</code>"


def render_page(values: dict[str, Any]) -> str:
    """Fill in the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(DOCS),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # the template is Markdown
    )
    environment.filters["cell"] = code_cell
    return environment.get_template("tutorial.md.j2").render(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("output/demo/model"),
        help="Checkpoint of the demo (default: %(default)s)",
    )
    parser.add_argument("--cache-dir", type=Path, help="Where `make demo` keeps models and images")
    parser.add_argument("--image", default="1f44b-1f3fd.png", help="A held-out drawing")
    args = parser.parse_args()
    values = follow_image(args.checkpoint, args.cache_dir, args.image)
    (DOCS / "tutorial.md").write_text(render_page(values), encoding="utf-8")


if __name__ == "__main__":
    main()
