"""Write docs/tutorial.md and its pictures: one drawing of the demo, followed from its bytes to the gradient and to a caption.

    make docs          # after `make demo`; or: python docs/make_tutorial.py --checkpoint output/demo/model

Every number in the text comes from running the code, so that the text can't say what the code does not do; but for the
exercises' few, which take minutes: "some".
"""

from __future__ import annotations

import argparse
import inspect
import logging
from dataclasses import replace
from pathlib import Path
from textwrap import indent
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image
from transformers import CLIPVisionConfig

from llava_simplified.data.collate import Collator, Example
from llava_simplified.data.dataset import CaptionDataset
from llava_simplified.data.images import decode_image, read_image_bytes
from llava_simplified.data.records import open_records
from llava_simplified.demo.assets import fetch
from llava_simplified.model.generation import Decoding, GenerationOptions
from llava_simplified.model.language_model import shared_prefix_mask
from llava_simplified.model.llava import Llava
from llava_simplified.model.vision import VisionTower
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX
from llava_simplified.serve.attention_map import WORD, attention_map

HERE = Path(__file__).parent
PICTURES = HERE / "img"
IMAGE_COLOUR, TEXT_COLOUR, TRAINED_COLOUR = "#ffd8a8", "#e9ecef", "#b2f2bb"
logging.getLogger("matplotlib.category").setLevel(logging.ERROR)


def follow(checkpoint: Path, cache_dir: Path | None, image: str) -> dict[str, Any]:
    """Run every station on one sample, and note what there is to see."""
    torch.manual_seed(0)
    assets = fetch(cache_dir)
    model = Llava.from_pretrained(checkpoint, device="cpu", dtype="float32", trainable=True)
    records = open_records(assets.val_json)
    record = next(records[i] for i in range(len(records)) if records[i].images == (image,))
    seen: dict[str, Any] = {"image": image, "caption": record.responses[0]}

    data = read_image_bytes(image, assets.images)
    pixels = decode_image(data)
    tensor = model.vision_tower.transform(pixels)
    seen |= {"bytes": len(data), "decoded": pixels.shape, "pixels": tuple(tensor.shape)}
    features = model.vision_tower(tensor[None])
    image_tokens = model.projector(features)
    table = model.language_model.get_input_embeddings().weight
    seen |= {
        "features": tuple(features.shape),
        "image_tokens": tuple(image_tokens.shape),
        "deviation": (float(image_tokens.detach().std()), float(table.detach().std())),
        "layers": model.vision_tower.select_layers,
    }

    dataset = CaptionDataset(records, model.prompt, assets.images, model.vision_tower.transform)
    example = dataset.tokenize(record, record.responses)
    example.pixel_values = tensor[None]
    seen["tokens"] = [
        (
            "<image>"
            if token == IMAGE_INDEX
            else model.tokenizer.convert_ids_to_tokens([token])[0],
            token,
            label != IGNORE_INDEX,
        )
        for token, label in zip(example.input_ids, example.labels)
    ]
    batch = Collator(model.vision_tower.num_tokens, model.prompt.end_id)([example])
    batch.pop("metadata")
    seen |= {
        "input_ids": batch["input_ids"][0].tolist(),
        "logit_positions": batch["logit_positions"].tolist(),
    }
    # the same sample as the tutorial's tower would see it: its shapes are known without its weights
    clip = CLIPVisionConfig(image_size=224, patch_size=16)
    tower = VisionTower.from_config(
        clip, replace(model.vision_tower.transform, resize=224, crop=(224, 224)), select_layer=-2
    )
    wide = Collator(tower.num_tokens, model.prompt.end_id)([example])
    seen["clip"] = {"tokens": tower.num_tokens, "width": tower.width, "grid": tower.grid[0],
                    "length": wide["input_ids"].shape[1], "logit_positions": wide["logit_positions"].tolist()}  # fmt: skip
    seen["embeds"] = tuple(model.splice(batch["input_ids"], features).shape)

    def losses() -> list[float]:
        with torch.no_grad():
            logits = model(**batch).logits
            return torch.nn.functional.cross_entropy(
                logits, batch["labels"], reduction="none"
            ).tolist()

    words = model.tokenizer.convert_ids_to_tokens(batch["labels"].tolist())
    with model.language_model.disable_adapter():
        before = losses()
    seen["losses"] = list(zip(words, before, losses()))
    output = model(**batch)
    output.loss.backward()
    seen["loss"] = (output.loss.item(), tuple(output.logits.shape))
    parts = {"projector": "projector.", "LoRA adapter": "lora_", "vision tower": "vision_tower."}
    seen["gradients"] = {
        name: [p.grad for n, p in model.named_parameters() if key in n]
        for name, key in parts.items()
    }
    seen["gradients"]["language model itself"] = [
        p.grad
        for n, p in model.named_parameters()
        if n.startswith("language_model.") and "lora_" not in n
    ]

    decoding = Decoding(
        model,
        [model.prompt.render(record.turns, None).input_ids],
        features.detach(),
        GenerationOptions(24),
    )
    seen["steps"] = []
    while decoding.live:
        best = decoding._logits[0].softmax(-1).topk(3)
        ((_, token),) = decoding.step()
        names = model.tokenizer.convert_ids_to_tokens(best.indices.tolist())
        seen["steps"].append(
            (
                model.tokenizer.convert_ids_to_tokens([token])[0],
                list(zip(names, best.values.tolist())),
            )
        )
    seen["said"] = model.prompt.decode(decoding.tokens[0])

    shared = Collator(2, 0)(
        [
            Example(
                [7, IMAGE_INDEX, 8, 1, 2, 3, 4],
                [IGNORE_INDEX] * 3 + [1, 2, 3, 4],
                branches=[0, 0, 0, 1, 1, 2, 2],
            )
        ]
    )
    seen["mask"] = shared_prefix_mask(
        shared["segment_ids"], shared["branch_ids"], shared["position_ids"]
    )[0, 0]
    seen["places"] = shared["position_ids"][0].tolist()
    grids = attention_map(model, record.turns[-1].content, [assets.images / image], seen["said"])[
        :, 0
    ].numpy()
    draw_patches(pixels, tensor.permute(1, 2, 0).numpy(), model.vision_tower.grid[0], tower.grid[0])
    draw_sequence(seen["tokens"], seen["input_ids"], seen["logit_positions"])
    draw_mask(seen["mask"].numpy())
    draw_attention(tensor.permute(1, 2, 0).numpy(), WORD.findall(seen["said"]), grids)
    seen["files"] = [
        (path.relative_to(checkpoint).as_posix(), path.stat().st_size)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and "train" not in path.name and path.parent.name != "eval_captions"
    ]
    owners = {
        "projector": model.projector,
        "tower": model.vision_tower,
        "language model": model.language_model,
    }
    seen["parameters"] = {
        name: sum(p.numel() for n, p in part.named_parameters() if "lora_" not in n)
        for name, part in owners.items()
    }
    seen["parameters"]["adapter"] = sum(
        p.numel() for n, p in model.named_parameters() if "lora_" in n
    )
    seen["matrices"] = [tuple(p.shape) for p in model.projector.parameters() if p.dim() == 2]
    return seen


def splice_code() -> str:
    """The statements of `Llava.splice` that do the work, from the code itself."""
    lines = (
        inspect.getsource(Llava.splice).partition('"""\n')[2].rpartition('"""\n')[2].splitlines()
    )
    kept = [
        line.strip()
        for line in lines
        if line.lstrip().startswith(
            ("is_image =", "embeds =", "image_tokens =", "return embeds.masked")
        )
    ]
    assert len(kept) == 4, "the splice is written otherwise now"
    return indent("\n".join(kept), "    ")


def save(name: str) -> None:
    """A small palette picture in docs/img."""
    PICTURES.mkdir(exist_ok=True)
    plt.savefig(PICTURES / name, dpi=110, bbox_inches="tight")
    plt.close()
    Image.open(PICTURES / name).convert("RGB").quantize(256).save(PICTURES / name, optimize=True)


def draw_patches(decoded: np.ndarray, resized: np.ndarray, ours: int, clips: int) -> None:
    """The picture as it comes, and under the grids of the demo's tower and of CLIP ViT-B/16."""
    _, axes = plt.subplots(1, 3, figsize=(9, 3.3))
    titles = (
        f"decoded: {decoded.shape[0]} x {decoded.shape[1]}",
        f"the demo's tower: {ours} x {ours}",
        f"CLIP ViT-B/16: {clips} x {clips}",
    )
    for axis, picture, grid, title in zip(
        axes, (decoded, resized, resized), (0, ours, clips), titles
    ):
        axis.imshow(picture)
        axis.set_title(title, fontsize=10)
        axis.set(xticks=[], yticks=[])
        for line in range(1, grid):
            axis.axhline(line * len(picture) / grid - 0.5, color="#e03131", lw=0.8)
            axis.axvline(line * len(picture) / grid - 0.5, color="#e03131", lw=0.8)
    save("patches.png")


def boxes(axis: Axes, row: float, texts: list[str], colours: list[str]) -> None:
    for column, (text, colour) in enumerate(zip(texts, colours)):
        axis.add_patch(
            plt.Rectangle(
                (column + 0.04, row), 0.92, 0.8, facecolor=colour, edgecolor="#868e96", lw=0.6
            )
        )
        size, turn = 5.5 if len(text) > 9 else 7, 90 if len(text) > 3 else 0
        axis.text(
            column + 0.5, row + 0.4, text, ha="center", va="center", fontsize=size, rotation=turn
        )


def draw_sequence(
    tokens: list[tuple[str, int, bool]], input_ids: list[int], positions: list[int]
) -> None:
    """Ids, the same after the splice, and what is trained: each label under the position that predicts it."""
    place = next(i for i, (_, token, _) in enumerate(tokens) if token == IMAGE_INDEX)
    many = input_ids.count(IMAGE_INDEX)
    names = [word.replace("Ġ", "").replace("Ċ", "line") for word, _, _ in tokens]
    spliced = names[:place] + ["image"] * many + names[place + 1 :]
    figure, axis = plt.subplots(figsize=(7.2, 3.2))
    figure.subplots_adjust(0, 0, 1, 1)
    boxes(axis, 4, names, [IMAGE_COLOUR if i == place else TEXT_COLOUR for i in range(len(names))])
    boxes(
        axis,
        2,
        spliced,
        [IMAGE_COLOUR if place <= i < place + many else TEXT_COLOUR for i in range(len(spliced))],
    )
    for side in (0, 1):
        axis.plot([place + side, place + side * many], [4, 2.8], color="#f08c00", lw=1)
    labels = [""] * len(spliced)
    for position in positions:
        labels[position] = spliced[position + 1]
    boxes(axis, 0, labels, [TRAINED_COLOUR if label else "white" for label in labels])
    for row, text in ((4.4, "input_ids"), (2.4, "after the splice"), (0.4, "to be said next")):
        axis.text(-0.3, row, text, ha="right", va="center", fontsize=9)
    axis.set(xlim=(-4, len(spliced)), ylim=(-0.1, 5))
    axis.axis("off")
    save("sequence.png")


def draw_mask(mask: np.ndarray) -> None:
    names = ["prompt", "image", "image", "prompt", "a 1", "a 2", "b 1", "b 2"]
    _, axis = plt.subplots(figsize=(3.4, 3.4))
    colour = np.where(mask, np.where(np.arange(len(mask)) < 4, 1, 2)[None, :], 0)
    axis.imshow(
        colour, cmap=matplotlib.colors.ListedColormap(["white", IMAGE_COLOUR, TRAINED_COLOUR])
    )
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="#ced4da", lw=0.6)
    axis.tick_params(which="both", length=0)
    axis.set_title("a row sees the coloured columns", fontsize=9)
    save("mask.png")


def draw_attention(picture: np.ndarray, words: list[str], grids: np.ndarray) -> None:
    """Under each word of the caption, the share of attention that went to each place: what the mean of the words had is
    taken off, since some places (corners) are looked at whatever is said."""
    offset = grids - grids.mean(0)
    _, axes = plt.subplots(1, len(words), figsize=(1.7 * len(words), 2.2), squeeze=False)
    for axis, word, grid, share in zip(axes[0], words, offset, grids):
        axis.imshow(picture, extent=(0, 1, 0, 1))
        axis.imshow(
            grid,
            extent=(0, 1, 0, 1),
            cmap="bwr",
            alpha=0.45,
            vmin=-abs(offset).max(),
            vmax=abs(offset).max(),
        )
        axis.set_title(f"{word.strip()}\n{share.sum():.0%}", fontsize=8)
        axis.set(xticks=[], yticks=[])
    save("attention.png")


def code(text: str) -> str:
    """As code in a table's cell, where a bar would end the cell."""
    return (
        f"<code>{text.replace('<', '&lt;').replace('>', '&gt;').replace('|', '&#124;')}</code>"
        if "|" in text
        else f"`{text}`"
    )


def write(seen: dict[str, Any]) -> str:
    """The text around the numbers."""
    count, clip = seen["features"][1], seen["clip"]
    trained = sum(flag for *_, flag in seen["tokens"])
    rows = "\n".join(
        f"| {code(word)} | {number} | {'trained' if flag else ''} |"
        for word, number, flag in seen["tokens"]
    )
    losses = "\n".join(
        f"| {code(word)} | {before:.2f} | {after:.2f} |" for word, before, after in seen["losses"]
    )
    steps = "\n".join(
        f"| {code(word)} | {', '.join(f'{code(name)} {share:.2f}' for name, share in best)} |"
        for word, best in seen["steps"]
    )

    def norm(grads: list[torch.Tensor | None]) -> str:
        squares = [float(grad.norm()) ** 2 for grad in grads if grad is not None]
        return f"{sum(squares) ** 0.5:.3f}" if squares else "none: frozen"

    gradients = "\n".join(
        f"| {name} | {len(grads)} | {norm(grads)} |" for name, grads in seen["gradients"].items()
    )
    files = "\n".join(f"| `{name}` | {size:,} |" for name, size in seen["files"])
    last = seen["logit_positions"][0]
    places = " ".join(map(str, seen["places"]))
    millions = {name: f"{number / 1e6:.1f} million" for name, number in seen["parameters"].items()}
    saved = sum(size for _, size in seen["files"]) / 1e6
    return f"""# One picture, followed through the code

LLaVA in a sentence: a vision model that was trained before turns a picture into a grid of vectors, a small network maps each of them into the space of word embeddings, and there they
stand among the words of a prompt, for a language model that was trained before as well and now learns to say what they show.

    picture -> vision tower -> projector -> {count:>2} tokens --+
               (frozen)        (trained)                +-> language model -> answer
    prompt  -> word embeddings, <image> gives way ------+   (frozen; LoRA trained)

This page is written by `docs/make_tutorial.py`, which runs the code on one drawing of the demo that the model never saw, `{seen["image"]}`:
"{seen["caption"]}". Open the named files beside it. You should know PyTorch; LLaVA you will know at the end. [The notebook](tutorial.ipynb) does the same on
models so small that it trains one in seconds, and its cells are yours to break. Beside the demo's small tower stand the figures of CLIP ViT-B/16, the one
that is usual for photographs.

What to look for, and where it is answered:

| | the demo's model | with CLIP ViT-B/16 | station |
|---|---|---|---|
| Where do the image tokens enter? | {count} of them take the place of `<image>` among the word embeddings | {clip["tokens"]}, in the same way | [2](#2-pixels-become-patch-features-modelvisionpy), [5](#5-the-splice-llavasplice-in-modelllavapy) |
| Which tokens are trained? | the answer and its end token: {trained} of {seen["embeds"][1]} positions | the same {trained}, of {clip["length"]} | [4](#4-text-becomes-ids-and-labels-promptpy), [6](#6-the-loss-llavaforward) |
| What is frozen? | the vision tower ({millions["tower"]} parameters), and the language model's own weights ({millions["language model"]}) | the same parts | [2](#2-pixels-become-patch-features-modelvisionpy), [7](#7-the-gradient-modellorapy) |
| What trains? | the projector ({millions["projector"]}), and LoRA's matrices beside the language model's ({millions["adapter"]}) | the same parts | [3](#3-features-become-image-tokens-modelprojectorpy), [7](#7-the-gradient-modellorapy) |
| How is a caption made? | image and prompt are run once, then token after token is chosen | in the same way | [8](#8-the-caption-modelgenerationpy) |
| Why do captions share a prompt? | five take {seen["embeds"][1] + 4 * trained} positions, not {5 * seen["embeds"][1]} | {clip["length"] + 4 * trained}, not {5 * clip["length"]:,} | [9](#9-several-captions-of-one-picture-modellanguage_modelpy) |
| What is saved? | what trains, {saved:.0f} MB with the tokenizer; of what does not, name and fingerprint | the same | [10](#10-what-is-saved-modelcheckpointpy) |

## 1. Bytes become pixels: `data/images.py`

The file has {seen["bytes"]:,} bytes. `decode_image` makes {seen["decoded"]} of them, uint8, upright, transparency on white;
`ImageTransform` resizes and crops to what the vision tower was trained on: {seen["pixels"]}, still uint8. Normalising waits until the
pixels are on the device: a quarter of the bytes to carry.

## 2. Pixels become patch features: `model/vision.py`

`VisionTower` runs a pretrained vision model and keeps one vector for each place in the picture, its **patch features**. CLIP ViT-B/16 cuts 224 x 224 pixels
into patches of 16 x 16: 224 / 16 = {clip["grid"]} in a row, **{clip["grid"]} x {clip["grid"]} = {clip["tokens"]} in all**. Its transformer gives a vector of {clip["width"]} numbers for each, taken from the last layer but one:
(1, {clip["tokens"]}, {clip["width"]}). (One vector more, CLS, sums the picture up; LLaVA leaves it out.) The demo's tower is a small convolutional one. It has feature maps in place of patches: those of its hidden states
{list(seen["layers"])}, averaged down to a grid of {int(count**0.5)} x {int(count**0.5)} (few tokens train fast on two cores) and laid side by side, give {seen["features"]}: one picture, {count} places, {seen["features"][2]:,} numbers each.

![the drawing, and the grids of two towers](img/patches.png)

The tower is **frozen**: it never learns, so the trainer runs it once per picture and keeps the features (`training/feature_cache.py`).

## 3. Features become image tokens: `model/projector.py`

The projector, two matrices {" and ".join(map(str, seen["matrices"]))} with a GELU between them, maps each vector to the width of the language model's own embeddings: {seen["image_tokens"]}. As
many vectors come out as went in: a patch is a token. Nothing says
that such a vector must mean a word; but it should begin at their size, or the first steps are spent on it: `init_projector_scale` starts the image tokens with the
embeddings' deviation, {seen["deviation"][1]:.3f}. (Here, after training, they deviate by {seen["deviation"][0]:.3f}: the model has found it useful to speak up.) The
projector is **trained**.

## 4. Text becomes ids and labels: `prompt.py`

One place renders all prompts. `<image>` is one id here, {IMAGE_INDEX}, that no vocabulary has. (Ġ is a space before the word, Ċ a line's end. The demo's template is `bare`; with a model's own chat
template, words like `user` and `assistant` stand around the same texts.)

| token | id | |
|---|---|---|
{rows}

**Trained are {trained} of these {len(seen["tokens"])}**: the answer and the token that ends it, nothing else. The labels are right by construction: the
answer is encoded on its own, and where it begins the labels begin. Everywhere else the label is {IGNORE_INDEX}, which PyTorch's cross entropy passes over: neither the picture nor the question is to be
said, so nothing is learned from them as words.

## 5. The splice: `Llava.splice` in `model/llava.py`

The collator repeats the image's id once per image token: {len(seen["input_ids"])} ids, {count} of them {IMAGE_INDEX}. Embedding them gives {seen["embeds"]}; then the image tokens take the places of their ids, in reading order. That is where the {count} tokens enter, in the midst of the prompt, before the language
model's first layer. What LLaVA does to a language model's input is these four lines:

{splice_code()}

With CLIP ViT-B/16 the same sample has {clip["length"]} positions, {clip["tokens"]} of them image: the {clip["tokens"]} patches of station 2, projected, enter just here. The language model does not know which is which: it reads vectors.

![input ids, the sequence after the splice, and the labels](img/sequence.png)

## 6. The loss: `Llava.forward`

A token is predicted from the position before it (the green row of the picture). The collator lists those positions, {seen["logit_positions"]}, and the head, a matrix as
large as the vocabulary, runs there and nowhere else: logits of ({seen["loss"][1][0]}, {seen["loss"][1][1]:,}) instead of ({seen["embeds"][1]}, {seen["loss"][1][1]:,}). The first trained token is
predicted at position {last}, the last one of the prompt. With CLIP ViT-B/16 they are {clip["logit_positions"][0]} to {clip["logit_positions"][-1]}: {trained / clip["length"]:.0%} of all.

| token to say | loss without the adapter | with it |
|---|---|---|
{losses}

(Without the adapter stands the language model as it came, behind the same trained projector.) The loss is summed, here {seen["loss"][0]:.2f}, and divided by the trained tokens of the whole step: four batches of one are then one batch of four.

## 7. The gradient: `model/lora.py`

| part | tensors | norm of the gradient |
|---|---|---|
{gradients}

The gradient flows back through the frozen language model into LoRA's small matrices (each large matrix W is used as W + BA, with A and B of few rows and columns; only they learn) and, through the image
tokens, into the projector; there it ends. LLaVA trains in two stages, and so does the demo: first the projector alone (`configs/demo_projector.yaml`), then LoRA and the projector together
(`configs/demo.yaml`). `check_trainable` asserts at every start that just these parts train.

## 8. The caption: `model/generation.py`

The prompt, image tokens in it, is run once, its keys and values are kept, and one token after another is chosen, here always the likeliest, until it is the end token:

| chosen | the three most likely |
|---|---|
{steps}

It says: "{seen["said"]}". The picture's name is "{seen["caption"]}".

Where it looked while it chose each word (`serve/attention_map.py`): the share of attention that went to the picture, and which places had more of it (red) or less
(blue) than for the other words.

![the attention to the picture, word by word](img/attention.png)

## 9. Several captions of one picture: `model/language_model.py`

COCO has five captions for a picture. As five sequences, each computes the same image and prompt again, which are nearly all of its positions: with CLIP ViT-B/16 and captions as long as this one,
5 x {clip["length"]} = {5 * clip["length"]:,}. Computed once, with the captions as branches behind them, it is {clip["length"] - trained} + 5 x {trained} = {clip["length"] + 4 * trained}. Captions a and b see the prompt and themselves, not each other:

![who sees whom in a shared prompt](img/mask.png)

The places in the text that the model is told are, of the figure's prompt of four and its two captions, `{places}`: every caption counts on from the prompt's end, and its first token is predicted from there. So each
sees what it would see alone, and loss and gradients are those of separate sequences, to 1e-10 in float64 (`tests/model/test_sharing.py`; [the argument](design.md#captions-of-one-picture-on-a-shared-prompt)).

## 10. What is saved: `model/checkpoint.py`

What was trained: the projector and the adapter, {millions["projector"]} and {millions["adapter"]} parameters. Beside them the tokenizer and how to prepare a picture; and in `llava.json` the
choices of the run, and the names and fingerprints of the two models that were not trained. (The run's log and curves lie there too; after stage 1 there is no adapter.)

| file | bytes |
|---|---|
{files}

Together {saved:.0f} MB. The language model's own {millions["language model"]} weights and the tower's {millions["tower"]} are not among them: both models are found again by name, and refused if their weights are not the ones
of the training. `Llava.from_pretrained(folder)` needs no other argument. `llava export` writes the whole in the form that other tools load.

## Exercises

Each runs as it stands after `make demo` in the project's folder, and [in the notebook](tutorial.ipynb), where no demo is needed. First, where the demo keeps its models and pictures, and its first stage as a command to vary:

    . .venv/bin/activate
    ASSETS=~/.cache/llava-simplified/demo-v1
    stage1() {{ "$@" --config configs/demo_projector.yaml --model_name_or_path $ASSETS/language_model --vision_tower $ASSETS/vision_tower \\
        --train_data_path $ASSETS/pictures/train.json --train_image_folder $ASSETS/pictures/images; }}

1. **Swap the tower.** One of CLIP ViT-B/16's shape, its weights random, for it is the shapes that you are to see; then the demo's:

        python -c "from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel as Tower; Tower(CLIPVisionConfig(patch_size=16)).save_pretrained('output/clip'); CLIPImageProcessorPil().save_pretrained('output/clip')"
        inspect_with() {{ llava inspect --data $ASSETS/pictures/train.json --model_name_or_path $ASSETS/language_model --template bare --count 1 --vision_tower "$@"; }}
        inspect_with output/clip
        inspect_with $ASSETS/vision_tower --mm_token_pool 3

    Of the file's first record, `<image> x 196` becomes `<image> x 9`, and the same 5 tokens are trained. What else of stations 1 to 6 changes with the tower, and what does not? How much of the whole file is pictures?

2. **Change the projector.** Is the second matrix of station 3 worth its parameters? (A minute or two.)

        stage1 llava train --mm_projector_type linear --output_dir output/linear

    Compare `trainer_log.jsonl` in `output/linear` and in `output/demo/projector`, the same run with two matrices: one alone is ahead here, after 40 steps at a loss of some 3.4 against 4.1. Would it
    be after both stages?

3. **Break the label mask, and see the loss lie.** Train on the prompt as well:

        stage1 python - --output_dir output/lie <<'END'
        import sys
        from llava_simplified.prompt import IGNORE_INDEX, Prompt, Rendered
        from llava_simplified.training.train_command import main
        right = Prompt._prefix
        def wrong(self, turns, where):
            ids, _ = right(self, turns, where)
            return Rendered(ids, [i if i >= 0 else IGNORE_INDEX for i in ids])
        Prompt._prefix = wrong
        main(sys.argv[1:])
        END

    From the first steps on the loss is lower than in `output/demo/projector`, at the end some 2.4 against 4.1. Did it learn more? No: 6 of some 13 trained tokens are the prompt's now, the same in every sample. They soon
    cost nothing, and are averaged in: 2.4 x 13 / 7 is some 4.5 for a token of the answer. (The notebook measures both models by the same, honest loss.)

4. **Shuffle the pictures.** The column *shuffled* is the score of every caption beside another picture's name:

        llava evaluate output/demo/predictions.json

    It falls to next to nothing. What would you think of a model whose score stays the same there?
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("output/demo/model"), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--cache-dir", type=Path, help="where `make demo` keeps models and pictures"
    )
    parser.add_argument("--image", default="1f44b-1f3fd.png", help="a held-out drawing")
    args = parser.parse_args()
    seen = follow(args.checkpoint, args.cache_dir, args.image)
    (HERE / "tutorial.md").write_text(write(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
