"""Write docs/rewards.md: five captions of one drawing, their rewards, their weights and their gradient, from a real run.

    make docs          # after `make demo` and `make demo-reward`

The text is in docs/rewards.md.j2. The numbers of a step come from running the code, and the results of a whole run come
from the files that `make demo-reward` has written.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import yaml
from PIL import Image

from llava_simplified.data.collate import Collator
from llava_simplified.data.images import decode_image, read_image_bytes
from llava_simplified.data.records import open_records
from llava_simplified.demo.assets import fetch
from llava_simplified.demo.reward_demo import (
    NUM_SAMPLES,
    SAMPLES_FOLDER,
    SHOWN_METRICS,
    read_comparison,
)
from llava_simplified.evaluation.training_curves import read_training_log
from llava_simplified.model.generation import encode_images
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.recipes import resolve_recipe
from llava_simplified.training.objectives import rloo_advantages
from llava_simplified.training.rewards import Reward
from llava_simplified.training.rollouts import (
    PromptDataset,
    PromptExample,
    TrainedAnswer,
    collate_answers,
    merge_equal_answers,
    sample_answers,
)

DOCS = Path(__file__).parent
FIGURES = DOCS / "img"
SAMPLES = 5
# Learning rate of the single step of gradient descent that the page shows.
STEP_SIZE = 0.003


# ---- one step on one drawing ----


def follow_step(checkpoint: Path, cache_dir: Path | None, image: str, seed: int) -> dict[str, Any]:
    """Sample captions of one drawing, reward them, and take one step of gradient descent."""
    assets = fetch(cache_dir)
    recipe = yaml.safe_load(resolve_recipe("demo_reward").read_text(encoding="utf-8"))
    model = Llava.from_pretrained(checkpoint, device="cpu", dtype="float32", trainable=True)
    records = open_records(assets.train_json)
    record = next(record for record in records if record.images == (image,))
    dataset = PromptDataset(records, model.prompt, assets.images, model.vision_tower.transform)
    example = dataset.tokenize(record, record.responses)
    pixels = model.vision_tower.transform(decode_image(read_image_bytes(image, assets.images)))
    example.image_features = encode_images(model, pixels[None]).clone()

    # 1. sample captions
    options = GenerationOptions(
        max_new_tokens=24, temperature=1.0, num_return_sequences=SAMPLES, seed=seed
    )
    [answers] = sample_answers(model, [example], [example.image_features], options, step=0)
    captions = [model.prompt.decode(answer).strip() for answer in answers]

    # 2. compute their rewards: each part of --reward for the page, and the weighted sum for training
    references = [other.responses for other in records]
    parts = {}
    repeated = [example] * SAMPLES
    for part in recipe["reward"].split(","):
        name, _, weight = part.partition("=")
        reward = Reward(name, references)
        parts[name] = (float(weight or 1), reward(repeated, captions))
    weighted_sum = Reward(recipe["reward"], references)
    rewards = torch.tensor(weighted_sum(repeated, captions))

    # 3. compare the rewards
    advantages = rloo_advantages(rewards[None])[0]
    means_of_others = rewards - advantages

    # 4. take a step
    before = log_probabilities(model, example, answers)
    norm, positions = train_once(model, example, answers, advantages)
    after = log_probabilities(model, example, answers)
    # If all rewards were equal, all advantages would be 0, and so would the gradient.
    constant_norm, _ = train_once(model, example, answers, torch.zeros(SAMPLES))

    rows = []
    for index, caption in enumerate(captions):
        row = {
            "caption": caption,
            "parts": [values[index] for _, values in parts.values()],
            "reward": float(rewards[index]),
            "mean": float(means_of_others[index]),
            "advantage": float(advantages[index]),
            "before": float(before[index].exp()),
            "after": float(after[index].exp()),
            "factor": float((after[index] - before[index]).exp()),
        }
        rows.append(row)
    # The placeholder of the prompt is replaced by the image tokens.
    prompt_length = len(example.input_ids) + model.vision_tower.num_tokens - 1
    answer_lengths = [len(answer) for answer in answers]
    return {
        "image": image,
        "reference": record.responses[0],
        "reward": recipe["reward"],
        "part_names": list(parts),
        "rows": rows,
        "distinct": len(set(map(tuple, answers))),
        "positions": positions,
        "separate_positions": SAMPLES * prompt_length + sum(answer_lengths),
        "norm": norm,
        "constant_norm": constant_norm,
        "step_size": STEP_SIZE,
    }


def to_batch(
    model: Llava, example: PromptExample, answers: list[list[int]], weights: torch.Tensor
) -> dict[str, Any]:
    """Return the distinct answers as branches of one prompt, each token with its weight."""
    trained = []
    for answer, weight in zip(answers, weights.tolist()):
        trained.append(TrainedAnswer(tuple(answer), scale=1.0, weight=weight, num_samples=1))
    collator = Collator(model.vision_tower.num_tokens, model.prompt.end_id)
    batch = collate_answers(collator, [example], [merge_equal_answers(trained)], share_prefix=True)
    # `Llava.forward` does not accept these entries.
    for name in ("metadata", "token_scales", "token_counts"):
        del batch[name]
    return batch


def train_once(
    model: Llava, example: PromptExample, answers: list[list[int]], advantages: torch.Tensor
) -> tuple[float, int]:
    """Take one step of gradient descent.

    Returns:
        The norm of the gradient, and the number of positions of the batch.
    """
    batch = to_batch(model, example, answers, advantages)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(**batch).loss / SAMPLES
    gradients = torch.autograd.grad(loss, trained)
    with torch.no_grad():
        for parameter, gradient in zip(trained, gradients):
            parameter -= STEP_SIZE * gradient
    norms = torch.stack([gradient.norm() for gradient in gradients])
    return float(norms.norm()), batch["input_ids"].numel()


@torch.no_grad()
def log_probabilities(
    model: Llava, example: PromptExample, answers: list[list[int]]
) -> torch.Tensor:
    """Return the log-probability of each answer, (answers,)."""
    totals = []
    for answer in answers:
        batch = to_batch(model, example, [answer], torch.ones(1))
        totals.append(model(**batch).log_probs.sum())
    return torch.stack(totals)


# ---- the whole run ----


def read_run(folder: Path) -> dict[str, Any]:
    """Return the scores before and after `make demo-reward`, and draw its rewards."""
    comparisons = []
    for name, path in (
        (f"{NUM_SAMPLES} samples", folder / SAMPLES_FOLDER / "scores.json"),
        ("greedy caption", folder / "scores.json"),
    ):
        before, after = read_comparison(path)
        rows = []
        for metric in SHOWN_METRICS:
            difference = after["compared with"]["differences"][metric]["difference"]
            values = (before["mean"][metric][0], after["mean"][metric][0])
            rows.append({"name": metric, "values": values, "difference": difference})
        lengths = [run["text"]["captions"]["words, mean"] for run in (before, after)]
        comparisons.append({"name": name, "metrics": rows, "lengths": lengths})
    points = read_training_log(folder / "model" / "trainer_log.jsonl")["reward"]
    draw_rewards(points)
    return {
        "comparisons": comparisons,
        "reference_length": after["text"]["references"]["words, mean"],
        "images": after["images"],
        "steps": int(points[-1][0]),
    }


def draw_rewards(points: list[tuple[float, float]]) -> None:
    """Draw the mean reward of the samples over the steps."""
    FIGURES.mkdir(exist_ok=True)
    steps, rewards = zip(*points)
    _, axis = plt.subplots(figsize=(6, 2.4))
    axis.plot(steps, rewards, color="#1971c2", lw=1)
    axis.set_xlabel("step")
    axis.set_ylabel("mean reward")
    axis.grid(alpha=0.3)
    path = FIGURES / "rewards.png"
    plt.savefig(path, dpi=110, bbox_inches="tight")
    plt.close()
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--demo",
        type=Path,
        default=Path("output/demo"),
        help="Output folder of the demo (default: %(default)s)",
    )
    parser.add_argument("--cache-dir", type=Path, help="Where `make demo` keeps models and images")
    parser.add_argument(
        "--image", default="1f939-1f3fd-200d-2640-fe0f.png", help="A training drawing"
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the samples")
    parser.add_argument(
        "--without-results",
        action="store_true",
        help="Leave the results of a whole run out of the page",
    )
    args = parser.parse_args()
    reward_demo = args.demo / "reward"
    if not args.without_results and not (reward_demo / "scores.json").is_file():
        parser.error(
            f"{reward_demo} has no results. Run `make demo-reward` first, or pass --without-results to leave them out of "
            "the page."
        )
    values = {
        "step": follow_step(args.demo / "model", args.cache_dir, args.image, args.seed),
        "run": None if args.without_results else read_run(reward_demo),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(DOCS),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # the template is Markdown
    )
    page = environment.get_template("rewards.md.j2").render(values)
    (DOCS / "rewards.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
