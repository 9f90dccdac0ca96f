"""Write docs/one-file.md: `llava_in_one_file.py`, with notes beside it that show the tensors of a real sample.

    make docs          # after `make demo`; or: python docs/make_one_file.py --checkpoint output/one-file

The text is in docs/one-file.md.j2. The code comes from the file, and all numbers come from running it on a drawing of the
demo.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import torch
import torch.nn.functional as F
from PIL import Image

DOCS = Path(__file__).parent
SOURCE = DOCS.parent / "llava_in_one_file.py"
sys.path.insert(0, str(DOCS.parent))

import llava_in_one_file as one_file  # noqa: E402
from llava_simplified.demo.assets import DemoAssets, fetch  # noqa: E402

# The choices of the demo, as fields of the file's `llava.json`.
SETTINGS = {
    "mm_projector_type": "linear",
    "mm_vision_select_layer": -1,
    "mm_token_pool": 3,
    "template": "bare",
    "instruction": "",
    "dtype": "float32",
}


# ---- cut the file into steps ----


def cut_source(text: str) -> dict[str, str]:
    """Cut the file into steps: its functions and the methods of `Llava`, each with the lines before it.

    Returns:
        The code of each step by name, in order. Together they are the whole file.
    """
    tree = ast.parse(text)
    # The last line of each step.
    ends: dict[str, int] = {"docstring": tree.body[0].end_lineno or 0}
    for node in tree.body[1:]:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            # Several imports are one step: the last one sets its end.
            ends["imports"] = node.end_lineno or 0
        elif isinstance(node, ast.ClassDef) and node.name == "Llava":
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    ends[method.name.strip("_")] = method.end_lineno or 0
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            ends[node.name] = node.end_lineno or 0
    lines = text.splitlines()
    # The last step includes the lines after its function.
    ends["main"] = len(lines)
    steps = {}
    start = 0
    for name, end in ends.items():
        steps[name] = "\n".join(lines[start:end]).strip("\n")
        start = end
    return steps


# ---- run the code ----


def make_model(assets: DemoAssets, records: list[dict[str, str]], cache: dict[str, Any]) -> Any:
    """Return an untrained model: base models, a new projector and a new adapter."""
    folders = {
        "language_model": str(assets.language_model),
        "vision_tower": str(assets.vision_tower),
    }
    model = one_file.Llava({**folders, **SETTINGS})
    # A few images are sufficient to measure the scale of the features.
    names = [record["image"] for record in records[:64]]
    features = one_file.look_up_features(model, names, assets.images, cache)
    table = model.language_model.get_input_embeddings().weight
    model.projector = one_file.new_projector(features, table)
    one_file.add_lora(model, rank=16, alpha=32)
    return model


def follow_sample(assets: DemoAssets, image: str, checkpoint: Path | None) -> dict[str, Any]:
    """Run every step of the file on one record, and return the values that the template shows."""
    # Set the seeds, so that the page changes only if the code does.
    random.seed(0)
    torch.manual_seed(0)
    records = one_file.read_records(assets.train_json)
    held_out = one_file.read_records(assets.val_json)
    sample = next(record for record in held_out if record["image"] == image)

    # Create an untrained model even if there is a checkpoint: the page compares both projectors.
    cache: dict[str, Any] = {}
    shuffled = random.sample(records, len(records))
    model = make_model(assets, shuffled, cache)
    fresh_projector = model.projector
    some_features = torch.stack(list(cache.values()))
    if checkpoint is not None:
        model = one_file.load(checkpoint)
        model.float()

    # Load the image as a tensor, and compute its features.
    path = assets.images / image
    with Image.open(path) as opened:
        opened_as = (opened.mode, opened.size)
        draw_image(opened)
    pixels = one_file.load_image(path, model.processor)
    maps = model.vision_tower(pixels[None]).last_hidden_state
    features = model.encode_images(pixels[None])

    # Prompt and labels.
    tokenizer = model.tokenizer
    num_image_tokens = features.shape[1]
    ids, labels = one_file.make_sequence(tokenizer, sample, num_image_tokens)

    # A batch of two: the other record has a long response, so that the sample is padded.
    other = max(shuffled[:20], key=lambda record: len(record["response"]))
    pair = [sample, other]
    sequences = [one_file.make_sequence(tokenizer, record, num_image_tokens) for record in pair]
    batch = one_file.collate(sequences, tokenizer.eos_token_id)

    # The scales that image tokens have with different projectors.
    table = model.language_model.get_input_embeddings().weight.detach()
    random_projector = torch.nn.Linear(features.shape[2], table.shape[1])
    with torch.no_grad():
        image_tokens = model.projector(features)
        stds = {
            "embeddings": table.std(),
            "random": random_projector(some_features).std(),
            "new": fresh_projector(some_features).std(),
            "trained": image_tokens.std(),
        }
    # The loss of the sample, and its gradients, which `describe_parts` reads below.
    one = one_file.collate([(ids, labels)], tokenizer.eos_token_id)
    loss = model(*one, features)
    loss.backward()
    return {
        "checkpoint": checkpoint is not None,
        "record": json.dumps(sample, ensure_ascii=False),
        "image": image,
        "opened": opened_as,
        "pixels": pixels,
        "maps": maps,
        "features": features,
        "tokens": describe_tokens(tokenizer, ids, labels),
        "length": len(ids),
        "prompt_length": labels.count(one_file.IGNORE),
        "trained": len(labels) - labels.count(one_file.IGNORE),
        "pair": pair,
        "batch": batch,
        "mask": ["".join(map(str, row)) for row in batch[2].tolist()],
        "embeddings": model.splice(one[0], features),
        "image_tokens": image_tokens,
        "stds": {name: f"{float(std):.3f}" for name, std in stds.items()},
        "vocabulary": len(table),
        "loss": loss.item(),
        "losses": token_losses(model, ids, labels, features),
        "parts": describe_parts(model),
        "layers": len(model.adapter_config["target_modules"]),
        "query": model.language_model.base_model.layers[0].self_attn.q_proj,
        "records": len(records),
        "feature_bytes": features[0].nelement() * 2,
        "rates": [(s, one_file.learning_rate(s, 300, 15, 1e-3)) for s in (0, 5, 15, 150, 299)],
        "files": list_files(model),
        **generate(model, path, sample["instruction"]),
    }


def draw_image(image: Image.Image) -> None:
    """Save the drawing for the page, transparent as it is in the file."""
    image.resize((144, 144)).save(DOCS / "img" / "one-file.png", optimize=True)


def describe_tokens(
    tokenizer: Any, ids: list[int], labels: list[int]
) -> list[tuple[str, Any, str]]:
    """Return (token, id, label) for each token, and one row for all image tokens together."""
    rows: list[tuple[str, Any, str]] = []
    for token_id, label in zip(ids, labels):
        if token_id == one_file.IMAGE:
            _, id_above, _ = rows[-1]
            if id_above != token_id:  # the first image token
                rows.append((f"image × {ids.count(token_id)}", token_id, ""))
            continue
        [token] = tokenizer.convert_ids_to_tokens([token_id])
        shown_label = "" if label == one_file.IGNORE else str(label)
        rows.append((token, token_id, shown_label))
    return rows


@torch.no_grad()
def token_losses(
    model: Any, ids: list[int], labels: list[int], features: torch.Tensor
) -> list[tuple[str, int, float]]:
    """Return (target token, position that predicts it, loss) for each token that counts in the loss."""
    inputs = model.splice(torch.tensor([ids]), features)
    logits = model.language_model(inputs_embeds=inputs).logits[0]
    rows = []
    # Each position predicts the token after it.
    for position, target in enumerate(labels[1:]):
        if target == one_file.IGNORE:
            continue
        [token] = model.tokenizer.convert_ids_to_tokens([target])
        loss = F.cross_entropy(logits[position], torch.tensor(target))
        rows.append((token, position, float(loss)))
    return rows


def describe_parts(model: Any) -> list[tuple[str, int, str]]:
    """Return (part, number of parameters, norm of the gradient) for each part."""
    groups: dict[str, list[torch.nn.Parameter]] = {
        "vision tower": [],
        "language model": [],
        "LoRA": [],
        "projector": [],
    }
    for name, parameter in model.named_parameters():
        # The LoRA matrices are inside the language model, but the page shows them as a separate part.
        if "lora_" in name:
            part = "LoRA"
        else:
            part = name.partition(".")[0].replace("_", " ")
        groups[part].append(parameter)
    rows = []
    for part, parameters in groups.items():
        count = sum(parameter.numel() for parameter in parameters)
        gradients = [
            parameter.grad.flatten() for parameter in parameters if parameter.grad is not None
        ]
        norm = "none: frozen"
        if gradients:
            norm = f"{float(torch.cat(gradients).norm()):.2f}"
        rows.append((part, count, norm))
    return rows


def generate(model: Any, path: Path, instruction: str) -> dict[str, Any]:
    """Caption the image, and return the shapes and the most likely tokens of each pass."""
    # For each pass: shape of the input, length of the cache, the most likely tokens.
    passes: list[tuple[tuple[int, ...], int, list[tuple[str, float]]]] = []

    def keep(_: Any, __: Any, arguments: dict[str, Any], outputs: Any) -> None:
        """Record a pass. A forward hook gets the module, its arguments, its keyword arguments and its outputs."""
        best = outputs.logits[0, -1].softmax(-1).topk(2)
        tokens = model.tokenizer.convert_ids_to_tokens(best.indices.tolist())
        shape = tuple(arguments["inputs_embeds"].shape)
        cached = outputs.past_key_values.get_seq_length()
        passes.append((shape, cached, list(zip(tokens, best.values.tolist()))))

    hook = model.language_model.register_forward_hook(keep, with_kwargs=True)
    text = one_file.caption(model, path, instruction, max_new_tokens=8)
    hook.remove()
    return {"passes": passes, "caption": text}


def list_files(model: Any) -> list[tuple[str, int]]:
    """Save the model, and return the files with their sizes in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        one_file.save(model, Path(folder))
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]


# ---- write the page ----


def code_cell(text: str) -> str:
    """Return text as code in a table cell, where a bar would end the cell."""
    escaped = str(text).replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")
    return f"<code>{escaped}</code>"


def module_link(module: str) -> str:
    """Return a link to the Python reference of a module, such as "model/llava.py"."""
    name = module.removesuffix(".py").replace("/", ".")
    return f"[`{module}`](python.md#llava_simplified.{name})"


def render_page(values: dict[str, Any]) -> str:
    """Fill in the template.

    Raises:
        RuntimeError: The template omits a step of the code, or has the steps in another order.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(DOCS),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,  # the template is Markdown
    )
    environment.filters["cell"] = code_cell
    environment.filters["shape"] = lambda tensor: str(tuple(tensor.shape))
    text = SOURCE.read_text(encoding="utf-8")
    steps = cut_source(text)
    shown: list[str] = []

    def step(name: str, caller: Any) -> str:
        """Return the code of a step beside its note, which the template passes as `caller`.

        The template uses it as a macro: {% call step("splice") %} the note {% endcall %}.
        """
        shown.append(name)
        code = f'<div class="code" markdown>\n\n```python\n{steps[name]}\n```\n\n</div>'
        note = f'<div class="note" markdown>\n\n{caller().strip()}\n\n</div>'
        return f'<div class="step" markdown>\n{code}\n{note}\n</div>\n'

    values = {**values, "step": step, "module": module_link, "lines": len(text.splitlines())}
    page = environment.get_template("one-file.md.j2").render(values)
    # The page must show the whole file, in its order.
    if shown != list(steps):
        raise RuntimeError(
            f"docs/one-file.md.j2 shows the steps {shown}, but llava_in_one_file.py has {list(steps)}. Adapt the template."
        )
    return page


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="Output folder of llava_in_one_file.py (default: an untrained model)",
    )
    parser.add_argument("--cache-dir", type=Path, help="Where `make demo` keeps models and images")
    parser.add_argument("--image", default="1f44b-1f3fd.png", help="A held-out drawing")
    args = parser.parse_args()
    values = follow_sample(fetch(args.cache_dir), args.image, args.checkpoint)
    (DOCS / "one-file.md").write_text(render_page(values), encoding="utf-8")


if __name__ == "__main__":
    main()
