"""A training step: `llava train` against stock LLaVA under transformers' Trainer and PEFT, under TRL, and against the tutorial's recipe.

    python benchmarks/bench_train.py [--language-model FOLDER] [--captions 1 5] [--steps 2] [--rounds 1]

The same weights on both sides (SmolLM2-135M, which is fetched where no folder is given, and a random tower of CLIP
ViT-B/16's shape), the same 224-pixel pictures, tokens, optimizer and number of updates; frozen weights in bfloat16, bfloat16
autocast (float32 on a machine that is slow in bfloat16); the losses of the first step must agree. Every run is a process of
its own, measured from its third step on, input included. Prints captions per second and peak memory as ratios, and the share
of what a large matrix product reaches on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = (
    "red dog",
    "a car",
    "the man",
    "of two",
    "woman with",
    "old street",
    "on a field",
    "in the park",
    "near water",
)
WARM_UP = 2  # steps: compilation, caches, allocator
LORA = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0}
PEERS = ("transformers + PEFT", "TRL's SFTTrainer", "the tutorial's recipe")
OURS = {  # one lever more in each line
    "ours: logits where trained": {"cache_vision_features": "off", "share_prefix": False},
    "+ cached features": {"cache_vision_features": "memory", "share_prefix": False},
    "+ shared prefixes": {"cache_vision_features": "memory"},
    "+ compiled layers": {"cache_vision_features": "memory", "compile_layers": True},
}


def number_type() -> str:
    """What every side computes in: bfloat16, or float32 on a machine that is slow in it. The runs inherit what was measured."""
    from llava_simplified.doctor_command import has_fast_bfloat16

    if "BENCH_DTYPE" not in os.environ:
        os.environ["BENCH_DTYPE"] = "bfloat16" if has_fast_bfloat16() else "float32"
    return os.environ["BENCH_DTYPE"]


def write_models(folder: Path, language_model: Path | None) -> tuple[Path, Path]:
    import torch
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    from llava_simplified.demo.assets import fetch

    torch.manual_seed(0)
    tower = folder / "clip"
    CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=16)).save_pretrained(tower)
    CLIPImageProcessorPil().save_pretrained(tower)
    return language_model or fetch().language_model, tower


def write_data(folder: Path, images: int, captions: int) -> None:
    """Pictures that need no resizing (its cost is the cleaner's benchmark), and captions of 8 to 16 words."""
    import numpy as np
    from PIL import Image

    draw, rows = random.Random(0), []
    for index in range(images):
        coarse = np.random.default_rng(index).integers(0, 256, (14, 14, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((224, 224)).save(folder / f"{index}.png")
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(4, 8))) for _ in range(captions)]
        rows.append(
            {
                "image": f"{index}.png",
                "instruction": "Generate a caption of this image:",
                "responses": texts,
            }
        )
    (folder / "train.json").write_text(json.dumps(rows))


def watch_steps(seen: list[tuple[float, float]]) -> None:
    """Note when each training step begins, and its loss, whoever's Trainer it is."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    step = transformers.Trainer.training_step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        loss = step(self, *args, **kwargs)
        seen.append((start, loss.item()))
        return loss

    transformers.Trainer.training_step = watched  # type: ignore[method-assign]


def train_ours(
    folder: Path, models: tuple[str, str], batch: int, steps: int, levers: dict[str, Any]
) -> None:
    from llava_simplified.arguments import parse_arguments
    from llava_simplified.training.train_command import train

    more = {
        "model_name_or_path": models[0],
        "vision_tower": models[1],
        "train_data_path": folder / "train.json",
        "output_dir": folder / "ours",
        "per_device_train_batch_size": batch,
        "pretrain_mm_mlp_adapter": folder / "projector",
        **common(steps),
        **LORA,
        **levers,
    }
    train(
        *parse_arguments(
            [word for name, value in more.items() for word in (f"--{name}", str(value))]
        )
    )


def common(steps: int) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "learning_rate": 2e-4,
        "warmup_steps": 0,
        "bf16": number_type() == "bfloat16",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "train_sampling_strategy": "sequential",
    }


def stock_model(folder: Path, models: tuple[str, str]) -> tuple[Any, Any, Any]:
    """What transformers' documentation of LLaVA amounts to: (model, processor, PEFT configuration)."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import load_file
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPImageProcessorPil,
        CLIPVisionModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(models[0])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    dtype = getattr(torch, number_type())
    text = AutoModelForCausalLM.from_pretrained(models[0], dtype=dtype)
    text.resize_token_embeddings(len(tokenizer))
    tower = CLIPVisionModel.from_pretrained(models[1], dtype=dtype)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower.config,
            text_config=text.config,
            image_token_id=image_token,
            projector_hidden_act="gelu",
        )
    ).to(dtype)
    model.model.vision_tower, model.model.language_model, model.lm_head = (
        tower,
        text.model,
        text.lm_head,
    )
    weights = load_file(folder / "projector" / "projector.safetensors")
    names = {"0.": "linear_1.", "2.": "linear_2."}
    model.model.multi_modal_projector.load_state_dict(
        {names[k[:2]] + k[2:]: v for k, v in weights.items()}
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(models[1]),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = LoraConfig(
        r=LORA["lora_r"],
        lora_alpha=LORA["lora_alpha"],
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector"],
    )
    return model, processor, config


def samples(folder: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """Picture, prompt and completion of every caption."""
    rows = []
    for row in json.loads((folder / "train.json").read_text()):
        turn = {"role": "user", "content": f"<image>\n{row['instruction']}"}
        prompt = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        for caption in row["responses"]:
            rows.append(
                {
                    "image": str(folder / row["image"]),
                    "prompt": prompt,
                    "completion": f"{caption}<|im_end|>",
                }
            )
    return rows


def train_stock(
    folder: Path, models: tuple[str, str], batch: int, steps: int, options: dict[str, Any]
) -> None:
    """transformers' Trainer with PEFT: every batch padded, logits at every position."""
    import torch
    from peft import get_peft_model
    from PIL import Image
    from transformers import Trainer, TrainingArguments

    model, processor, config = stock_model(folder, models)
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pictures = [Image.open(row["image"]).convert("RGB") for row in rows]
        texts = [row["prompt"] + row["completion"] for row in rows]
        inputs = processor(
            images=pictures, text=texts, padding=True, padding_side="right", return_tensors="pt"
        )
        trained = [len(processor.tokenizer(row["completion"]).input_ids) for row in rows]
        ends = inputs["attention_mask"].sum(1)
        place = torch.arange(inputs["input_ids"].shape[1])
        answer = (place >= (ends - torch.tensor(trained))[:, None]) & (place < ends[:, None])
        return {**inputs, "labels": inputs["input_ids"].masked_fill(~answer, -100)}

    args = TrainingArguments(
        output_dir=str(folder / "stock"),
        per_device_train_batch_size=batch,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing_kwargs={"use_reentrant": False},
        lr_scheduler_type="cosine",
        **common(steps),
        **options,
    )
    if options.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    Trainer(
        model, args, train_dataset=samples(folder, processor.tokenizer), data_collator=collate
    ).train()  # type: ignore[arg-type]


def train_trl(folder: Path, models: tuple[str, str], batch: int, steps: int) -> None:
    """TRL's SFTTrainer on prompts and completions, without the gradient checkpointing that it turns on by default."""
    import torch
    from datasets import Dataset
    from datasets import Image as ImageColumn
    from trl import SFTConfig, SFTTrainer

    model, processor, config = stock_model(folder, models)
    data = Dataset.from_list(samples(folder, processor.tokenizer)).cast_column(
        "image", ImageColumn()
    )
    args = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        max_length=None,
        lr_scheduler_type="cosine",
        **common(steps),
    )
    SFTTrainer(
        model, args=args, train_dataset=data, processing_class=processor, peft_config=config
    ).train()


def write_projector(folder: Path, models: tuple[str, str]) -> None:
    """A checkpoint of one step whose projector both sides start with."""
    levers = {
        **OURS["ours: logits where trained"],
        "mm_projector_type": "mlp2x_gelu",
        "tune_mm_mlp_adapter": True,
    }
    (folder / "projector").mkdir()
    from llava_simplified.arguments import parse_arguments
    from llava_simplified.training.train_command import train

    more = {
        "model_name_or_path": models[0],
        "vision_tower": models[1],
        "train_data_path": folder / "train.json",
        "output_dir": folder / "projector",
        "per_device_train_batch_size": 1,
        **common(1),
        **levers,
    }
    train(
        *parse_arguments(
            [word for name, value in more.items() for word in (f"--{name}", str(value))]
        )
    )


def matmul_limit() -> float:
    """FLOP/s of a large matrix product."""
    import torch

    a = torch.randn(2048, 2048, dtype=getattr(torch, number_type()))
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start))
    return best


def one_run(
    folder: Path, models: tuple[str, str], name: str, batch: int, steps: int
) -> dict[str, Any]:
    """In a process of its own: seconds per step, the first loss, peak memory, the limit of the machine."""
    seen: list[tuple[float, float]] = []
    watch_steps(seen)
    if name in OURS:
        train_ours(folder, models, batch, steps, {**OURS[name], "mm_projector_type": "mlp2x_gelu"})
    elif "TRL" in name:
        train_trl(folder, models, batch, steps)
    else:
        train_stock(
            folder,
            models,
            batch,
            steps,
            {"gradient_checkpointing": True} if "tutorial" in name else {},
        )
    times = [start for start, _ in seen]
    return {
        "seconds": (times[-1] - times[WARM_UP]) / (len(times) - 1 - WARM_UP),
        "loss": seen[0][1],
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "limit": matmul_limit(),
    }


def step_flops(folder: Path, models: tuple[str, str], images: int, captions: int) -> float:
    """What one of our steps with everything on has to compute: frozen weights twice, LoRA three times, no tower.

    Of attention the half below the diagonal, three times.
    """
    from transformers import AutoConfig, AutoTokenizer

    from llava_simplified.prompt import Message, Prompt

    config, prompt = (
        AutoConfig.from_pretrained(models[0]),
        Prompt(AutoTokenizer.from_pretrained(models[0])),
    )
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv = d // heads * config.num_key_value_heads
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]
    body = config.num_hidden_layers * sum(a * b for a, b in shapes)
    lora = config.num_hidden_layers * sum((a + b) * LORA["lora_r"] for a, b in shapes)
    rows = json.loads((folder / "train.json").read_text())
    length = trained = pairs = 0
    for row in rows:
        prefix, answers = prompt.render_branches(
            [Message("user", f"<image>\n{row['instruction']}")], row["responses"]
        )
        trained += sum(map(len, answers))
        before = len(prefix.input_ids) + 195
        length += before + sum(map(len, answers))
        pairs += before**2 / 2 + sum(len(answer) * (before + len(answer) / 2) for answer in answers)
    attention = (
        12 * pairs * d * config.num_hidden_layers
    )  # scores and sums, a multiplication and an addition each
    share = images / len(rows)
    return share * (
        length * (4 * body + 6 * lora) + attention + 4 * trained * d * config.vocab_size
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument(
        "--captions", type=int, nargs="+", default=[1, 5], help="captions per image"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=4,
        help="images in a batch; half as many where they have several captions",
    )
    parser.add_argument("--steps", type=int, default=2, help="measured steps")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--run", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        folder, language_model, tower, name, batch = args.run
        result = one_run(
            Path(folder), (language_model, tower), name, int(batch), WARM_UP + 1 + args.steps
        )
        (Path(folder) / "result.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        with contextlib.redirect_stdout(sys.stderr):  # the tables alone are the result
            models = tuple(map(str, write_models(root, args.language_model)))
        for captions in args.captions:
            folder = root / str(captions)
            folder.mkdir()
            images = args.batch if captions == 1 else args.batch // 2
            write_data(folder, images * (WARM_UP + 1 + args.steps), captions)
            with contextlib.redirect_stdout(sys.stderr):
                write_projector(folder, models)  # type: ignore[arg-type]
            names = [*PEERS, *OURS]
            results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
            for _ in range(args.rounds):
                for name in names:
                    shared = name.startswith("+ ") and OURS[name].get("share_prefix", True)
                    batch = images * (1 if shared else captions)
                    words = [
                        sys.executable,
                        __file__,
                        "--steps",
                        args.steps,
                        "--run",
                        folder,
                        *models,
                        name,
                        batch,
                    ]
                    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
                    if done.returncode:
                        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
                    results[name].append(json.loads((folder / "result.json").read_text()))
                    print(
                        f"{name}: {results[name][-1]['seconds']:.2f} s a step",
                        file=sys.stderr,
                        flush=True,
                    )
            flops = step_flops(folder, models, images, captions)  # type: ignore[arg-type]
            print_table(results, captions, images * captions, flops)


def print_table(
    results: dict[str, list[dict[str, Any]]], captions: int, samples: int, flops: float
) -> None:
    best = {name: min(runs, key=lambda run: run["seconds"]) for name, runs in results.items()}
    stock, trl, tutorial = (best[name] for name in PEERS)
    limit = max(run["limit"] for runs in results.values() for run in runs)
    print(f"\n{captions} caption(s) an image, {samples} captions an update, {number_type()}")
    heads = ("captions/s", "x Trainer", "x TRL", "x tutorial", "memory", "first loss", "of matmul")
    print(f"{'':32}" + "".join(f"{head:>12}" for head in heads))
    for name, run in best.items():
        values = [f"{samples / run['seconds']:.2f}"]
        values += [f"{peer['seconds'] / run['seconds']:.2f}" for peer in (stock, trl, tutorial)]
        values += [f"{run['memory'] / stock['memory']:.2f}", f"{run['loss']:.4f}"]
        values += [f"{flops / run['seconds'] / limit:.0%}"] if name == list(best)[-1] else []
        print(f"{name:32}" + "".join(f"{value:>12}" for value in values))
        if abs(run["loss"] / stock["loss"] - 1) > 0.01:
            sys.exit(
                f"{name}: the first loss is not the stock model's: the sides do not train the same thing"
            )


if __name__ == "__main__":
    main()
