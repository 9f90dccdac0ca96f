"""Write docs/tutorial.md: one drawing of the demo, followed from its bytes to the gradient and to a caption.

    make docs          # after `make demo`; or: python docs/make_tutorial.py --checkpoint output/demo/model

Every number in the text comes from running the code, so that the text can't say what the code does not do.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from llava_simplified.data.batching import Collator, Example
from llava_simplified.data.dataset import CaptionDataset
from llava_simplified.data.images import decode_image, read_image_bytes
from llava_simplified.data.records import open_records
from llava_simplified.demo.assets import fetch
from llava_simplified.model.generation import Decoding, GenerationOptions
from llava_simplified.model.language_model import who_sees_whom
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX

HERE = Path(__file__).parent


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
    example = dataset.text(record, record.responses)
    example.pixel_values = tensor[None]
    seen["tokens"] = [
        (
            "<image>" if token == IMAGE_INDEX else model.tokenizer.convert_ids_to_tokens([token])[0],
            token,
            label != IGNORE_INDEX,
        )
        for token, label in zip(example.input_ids, example.labels)
    ]
    batch = Collator(model.vision_tower.num_tokens, model.prompt.end_id)([example])
    batch.pop("about")
    seen |= {"input_ids": batch["input_ids"][0].tolist(), "positions": batch["positions"].tolist()}
    seen["embeds"] = tuple(model.splice(batch["input_ids"], features).shape)

    def losses() -> list[float]:
        with torch.no_grad():
            logits = model(**batch).logits
            return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none").tolist()

    words = model.tokenizer.convert_ids_to_tokens(batch["labels"].tolist())
    with model.language_model.disable_adapter():
        before = losses()
    seen["losses"] = list(zip(words, before, losses()))
    output = model(**batch)
    output.loss.backward()
    seen["loss"] = (output.loss.item(), tuple(output.logits.shape))
    parts = {"projector": "projector.", "LoRA adapter": "lora_", "vision tower": "vision_tower."}
    seen["gradients"] = {name: [p.grad for n, p in model.named_parameters() if key in n] for name, key in parts.items()}
    seen["gradients"]["language model itself"] = [
        p.grad for n, p in model.named_parameters() if n.startswith("language_model.") and "lora_" not in n
    ]

    decoding = Decoding(
        model, [model.prompt.render(record.turns, None).input_ids], features.detach(), GenerationOptions(24)
    )
    seen["steps"] = []
    while decoding.live:
        best = decoding._logits[0].softmax(-1).topk(3)
        ((_, token),) = decoding.step()
        names = model.tokenizer.convert_ids_to_tokens(best.indices.tolist())
        seen["steps"].append(
            (model.tokenizer.convert_ids_to_tokens([token])[0], list(zip(names, best.values.tolist())))
        )
    seen["said"] = model.prompt.decode(decoding.tokens[0])

    shared = Collator(2, 0)(
        [Example([7, IMAGE_INDEX, 8, 1, 2, 3, 4], [IGNORE_INDEX] * 3 + [1, 2, 3, 4], branches=[0, 0, 0, 1, 1, 2, 2])]
    )
    seen["mask"] = who_sees_whom(shared["segment_ids"], shared["branch_ids"], shared["position_ids"])[0, 0]
    seen["places"] = shared["position_ids"][0].tolist()
    manifest = json.loads((checkpoint / "llava.json").read_text(encoding="utf-8"))
    seen["files"] = [
        (path.relative_to(checkpoint).as_posix(), path.stat().st_size)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and "trainer" not in path.name
    ]
    seen["trained"] = manifest["trained"]
    return seen


def write(seen: dict[str, Any]) -> str:
    """The text around the numbers."""
    count = seen["features"][1]
    trained = sum(flag for *_, flag in seen["tokens"])
    rows = "\n".join(f"| `{word}` | {number} | {'trained' if flag else ''} |" for word, number, flag in seen["tokens"])
    losses = "\n".join(f"| `{word}` | {before:.2f} | {after:.2f} |" for word, before, after in seen["losses"])
    steps = "\n".join(
        f"| `{word}` | {', '.join(f'`{name}` {share:.2f}' for name, share in best)} |" for word, best in seen["steps"]
    )
    gradients = "\n".join(
        f"| {name} | {len(grads)} | {'none' if all(g is None for g in grads) else f'{sum(float(g.norm()) ** 2 for g in grads if g is not None) ** 0.5:.3f}'} |"
        for name, grads in seen["gradients"].items()
    )
    names = ["prompt", "image", "image", "prompt", "a1", "a1", "b1", "b1"]
    mask = "\n".join(
        f"    {name:<7}{place:>3}  " + "  ".join("x" if cell else "." for cell in row)
        for name, place, row in zip(names, seen["places"], seen["mask"].tolist())
    )
    files = "\n".join(f"| `{name}` | {size:,} |" for name, size in seen["files"])
    last = seen["positions"][0]
    return f"""# One picture, followed through the code

This page is written by `docs/make_tutorial.py`, which runs the code on one drawing of the demo that the model never saw, `{seen["image"]}`:
"{seen["caption"]}". Open the named files beside it. You should know PyTorch; LLaVA you will know at the end.

## 1. Bytes become pixels: `data/images.py`

The file has {seen["bytes"]:,} bytes. `decode_image` makes {seen["decoded"]} of them, uint8, upright, transparency on white;
`ImageTransform` resizes and crops to what the vision tower was trained on: {seen["pixels"]}, still uint8. Normalising waits until the
pixels are on the device: a quarter of the bytes to carry.

## 2. Pixels become patch features: `model/vision.py`

`VisionTower` runs a pretrained vision model and keeps, of its hidden states {list(seen["layers"])}, one vector for each place in the picture:
{seen["features"]}: one picture, {count} places, {seen["features"][2]:,} numbers each. (CLIP ViT-B/16 gives 196 places of 768 numbers; this
tower is a small convolutional one, pooled to {int(count**0.5)} x {int(count**0.5)}.) The tower is **frozen**: it never learns, so the trainer runs it once per
picture and keeps the features (`training/feature_cache.py`).

## 3. Features become image tokens: `model/projector.py`

The projector, two matrices and a GELU, maps them to the width of the language model's own embeddings: {seen["image_tokens"]}. Nothing says
that such a vector must mean a word; but it should be of their size. Image tokens deviate by {seen["deviation"][0]:.3f}, embeddings by
{seen["deviation"][1]:.3f}: `fit_to_embeddings` starts them there. The projector is **trained**.

## 4. Text becomes ids and labels: `prompt.py`

One place renders all prompts. `<image>` is one id here, {IMAGE_INDEX}, that no vocabulary has.

| token | id | |
|---|---|---|
{rows}

**Trained are {trained} of {len(seen["tokens"])} tokens**: the answer and the token that ends it, nothing else. The labels are right by construction: the
answer is encoded on its own, and where it begins the labels begin.

## 5. The splice: `Llava.splice` in `model/llava.py`

The collator repeats the image's id once per image token: {len(seen["input_ids"])} ids. Embedding them gives {seen["embeds"]}; then the image tokens take the
places of their ids. That is where the {count} tokens enter, and it is all that LLaVA does to a language model:

    [{", ".join("image" if token == IMAGE_INDEX else str(token) for token in seen["input_ids"])}]

## 6. The loss: `Llava.forward`

A token is predicted from the position before it. The collator lists those positions, {seen["positions"]}, and the head, a matrix as large as
the vocabulary, runs there and nowhere else: logits of {seen["loss"][1]} instead of ({seen["embeds"][1]}, {seen["loss"][1][1]:,}). The first trained token is
predicted at position {last}, the last one of the prompt.

| token to say | loss without the adapter | with it |
|---|---|---|
{losses}

The loss is summed, here {seen["loss"][0]:.2f}, and divided by the trained tokens of the whole step: four batches of one are then one batch of four.

## 7. The gradient: `model/lora.py`

| part | tensors | norm of the gradient |
|---|---|---|
{gradients}

It flows through the frozen language model into LoRA's small matrices and into the projector. `check_trainable` asserts that table at every start.

## 8. The caption: `model/generation.py`

The prompt is run once, its keys and values are kept, and one token after another is chosen:

| chosen | the three most likely |
|---|---|
{steps}

It says: "{seen["said"]}". The picture's name is "{seen["caption"]}".

## 9. Several captions of one picture: `model/language_model.py`

Image and prompt need not be computed once per caption. Each caption is a branch that sees the prompt and itself (x: row sees column); the
second column is the place in the text that the model is told, and it starts anew behind the prompt:

{mask}

Loss and gradients are those of separate sequences, to 1e-10 in float64 (`tests/model/test_sharing.py`).

## 10. What is saved: `model/checkpoint.py`

What was trained ({seen["trained"]} and projector), and the names and fingerprints of what was not:

| file | bytes |
|---|---|
{files}

## Exercises

1. Swap the tower: `--vision_tower` takes any Hugging Face vision model. What changes in station 2, and what nowhere else?
2. Train with `--mm_projector_type linear`. Which of the two matrices of station 3 was worth its parameters?
3. Break the labels: in `Prompt._prefix`, label the template's own tokens too. The loss falls faster, and lies: why?
4. Shuffle the pictures of the validation set before `llava predict`. The demo's report does this: what would you think of a model whose score stays?
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("output/demo/model"), help="(default: %(default)s)")
    parser.add_argument("--cache-dir", type=Path, help="where `make demo` keeps models and pictures")
    parser.add_argument("--image", default="1f44b-1f3fd.png", help="a held-out drawing")
    args = parser.parse_args()
    seen = follow(args.checkpoint, args.cache_dir, args.image)
    (HERE / "tutorial.md").write_text(write(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
