"""Compare a training step of `llava train` with stock LLaVA in transformers' Trainer and TRL, and with the tutorial.

    python benchmarks/bench_train.py [--language-model FOLDER] [--captions 1 5] [--steps 2] [--rounds 1]
    python benchmarks/bench_train.py --peer llama-factory ms-swift

The second command compares with LLaMA-Factory and ms-swift in place of TRL and the tutorial. They are installed
into separate virtual environments, with the same build of torch, the first time that they are named.

All sides have the same weights (SmolLM2-135M, downloaded if no folder is given, and a random tower in the
shape of CLIP ViT-B/16), images of 224 pixels, tokens, optimizer and number of updates. Frozen weights are
bfloat16, with bfloat16 autocast (float32 on a machine that is slow in bfloat16). The losses of the first
step must agree. Every run is a separate process, measured from its third step on, including the input.

Prints captions per second and peak memory as ratios, and the share of the speed that a large matrix product
reaches on this machine. `--output` also writes all runs as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from step_times import WARM_UP_STEPS, Step, record_steps, summarize
from training_peers import (
    TRAINING_PEERS,
    PeerRun,
    create_environment,
    installed_versions,
    run_peer,
    split_prompt,
    write_messages,
    write_stock_model,
)
from workload import (
    compute_dtype,
    option_arguments,
    run_child,
    stock_projector_weights,
    write_data,
    write_models,
)

LEARNING_RATE = 2e-4
LORA = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0}
TRAINER, TRL, TUTORIAL = "transformers + PEFT", "TRL's SFTTrainer", "the tutorial's recipe"
# What our side is compared with by default, and the heads of the columns with the ratios.
PEERS = {TRAINER: "x Trainer", TRL: "x TRL", TUTORIAL: "x tutorial"}
# Our side, with one more technique in each line.
OURS: dict[str, dict[str, Any]] = {
    "ours: logits where trained": {"cache_vision_features": "off", "share_prefix": False},
    "+ cached features": {"cache_vision_features": "memory", "share_prefix": False},
    "+ shared prefixes": {"cache_vision_features": "memory"},
    "+ compiled layers": {"cache_vision_features": "memory", "compile_layers": True},
}
OUR_PACKAGE = "llava-simplified"
Models = tuple[str, str]  # folders of language model and vision tower
Results = dict[str, list[dict[str, Any]]]  # the runs of each side


def common_options(steps: int) -> dict[str, Any]:
    """Return the options of transformers' Trainer that all sides share."""
    return {
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": 0,
        "bf16": compute_dtype() == "bfloat16",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "train_sampling_strategy": "sequential",
    }


# ---- our side ----


def train_ours(
    folder: Path, models: Models, output: Path, batch: int, steps: int, **options: Any
) -> None:
    """Run `llava train`."""
    from llava_simplified.arguments import parse_arguments
    from llava_simplified.training.train_command import train

    all_options = {
        "model_name_or_path": models[0],
        "vision_tower": models[1],
        "train_data_path": folder / "train.json",
        "output_dir": output,
        "per_device_train_batch_size": batch,
        "mm_projector_type": "mlp2x_gelu",
        **common_options(steps),
        **options,
    }
    train(*parse_arguments(option_arguments(all_options)))


def write_projector(folder: Path, models: Models) -> None:
    """Write a checkpoint of one step. All sides start with its projector."""
    output = folder / "projector"
    output.mkdir()
    train_ours(
        folder,
        models,
        output,
        batch=1,
        steps=1,
        tune_mm_mlp_adapter=True,
        cache_vision_features="off",
        share_prefix=False,
    )


# ---- other sides ----


def build_stock_model(folder: Path, models: Models) -> tuple[Any, Any, Any]:
    """Build a model as transformers' documentation of LLaVA describes it.

    Returns:
        The model, its processor, and a PEFT config with our LoRA rank.
    """
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

    dtype = getattr(torch, compute_dtype())
    tokenizer: Any = AutoTokenizer.from_pretrained(models[0])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    language_model: Any = AutoModelForCausalLM.from_pretrained(models[0], dtype=dtype)
    language_model.resize_token_embeddings(len(tokenizer))
    tower: Any = CLIPVisionModel.from_pretrained(models[1], dtype=dtype)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_act="gelu",
    )
    model: Any = LlavaForConditionalGeneration(config).to(dtype)
    model.model.vision_tower = tower
    model.model.language_model = language_model.model
    model.lm_head = language_model.lm_head
    weights = load_file(folder / "projector" / "projector.safetensors")
    model.model.multi_modal_projector.load_state_dict(stock_projector_weights(weights))
    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(models[1]),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    peft_config = LoraConfig(
        r=LORA["lora_r"],
        lora_alpha=LORA["lora_alpha"],
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector"],
    )
    return model, processor, peft_config


def read_samples(folder: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """Return image, prompt and completion of every caption."""
    samples = []
    for record in json.loads((folder / "train.json").read_text()):
        turn = {"role": "user", "content": f"<image>\n{record['instruction']}"}
        prompt = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        for caption in record["responses"]:
            sample = {
                "image": str(folder / record["image"]),
                "prompt": prompt,
                "completion": f"{caption}<|im_end|>",
            }
            samples.append(sample)
    return samples


def train_stock(
    folder: Path, models: Models, batch: int, steps: int, *, gradient_checkpointing: bool
) -> None:
    """Train with transformers' Trainer and PEFT: every batch padded, logits at every position."""
    import torch
    from peft import get_peft_model
    from PIL import Image
    from transformers import Trainer, TrainingArguments

    model, processor, peft_config = build_stock_model(folder, models)
    model = get_peft_model(model, peft_config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [Image.open(row["image"]).convert("RGB") for row in rows]
        texts = [row["prompt"] + row["completion"] for row in rows]
        inputs = processor(
            images=images, text=texts, padding=True, padding_side="right", return_tensors="pt"
        )
        # Labels are the tokens of the completion: the last ones before the padding.
        lengths = [len(processor.tokenizer(row["completion"]).input_ids) for row in rows]
        end = inputs["attention_mask"].sum(1)[:, None]
        start = end - torch.tensor(lengths)[:, None]
        position = torch.arange(inputs["input_ids"].shape[1])
        is_label = (position >= start) & (position < end)
        return {**inputs, "labels": inputs["input_ids"].masked_fill(~is_label, -100)}

    args = TrainingArguments(
        output_dir=str(folder / "stock"),
        per_device_train_batch_size=batch,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        lr_scheduler_type="cosine",
        **common_options(steps),
    )
    if gradient_checkpointing:
        model.enable_input_require_grads()
    samples: Any = read_samples(folder, processor.tokenizer)
    Trainer(model, args, train_dataset=samples, data_collator=collate).train()


def train_trl(folder: Path, models: Models, batch: int, steps: int) -> None:
    """Train with TRL's SFTTrainer, without the gradient checkpointing that is its default."""
    import torch
    from datasets import Dataset
    from datasets import Image as ImageColumn
    from trl import SFTConfig, SFTTrainer

    model, processor, peft_config = build_stock_model(folder, models)
    samples = Dataset.from_list(read_samples(folder, processor.tokenizer))
    samples = samples.cast_column("image", ImageColumn())
    args = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        max_length=None,
        lr_scheduler_type="cosine",
        **common_options(steps),
    )
    SFTTrainer(
        model,
        args=args,
        train_dataset=samples,
        processing_class=processor,
        peft_config=peft_config,
    ).train()


# ---- measuring ----


def run_side(folder: Path, models: Models, name: str, batch: int, steps: int) -> dict[str, Any]:
    """Measure one side, in this process, which was started for it.

    Returns:
        What `step_times.summarize` returns.
    """
    recorded: list[Step] = []
    record_steps(recorded)
    if name in OURS:
        projector = folder / "projector"
        options = LORA | OURS[name] | {"pretrain_mm_mlp_adapter": projector}
        train_ours(folder, models, folder / "ours", batch, steps, **options)
    elif name == TRL:
        train_trl(folder, models, batch, steps)
    else:
        checkpointing = name == TUTORIAL
        train_stock(folder, models, batch, steps, gradient_checkpointing=checkpointing)
    return summarize(recorded, compute_dtype())


def step_flops(folder: Path, models: Models, images: int) -> float:
    """Return the FLOPs that a step with all our techniques needs, without the vision tower.

    A weight costs two FLOPs per token (multiply, add) in each of: forward, gradient of the input,
    gradient of the weight. Frozen weights have the first two, LoRA all three. Of attention, the half
    below the diagonal is counted.
    """
    from transformers import AutoConfig, AutoTokenizer

    from llava_simplified.prompt import Message, Prompt

    config: Any = AutoConfig.from_pretrained(models[0])
    prompt = Prompt(AutoTokenizer.from_pretrained(models[0]))
    hidden, inner = config.hidden_size, config.intermediate_size
    kv_width = hidden // config.num_attention_heads * config.num_key_value_heads
    shapes = [
        (hidden, hidden),  # query
        (hidden, kv_width),  # key
        (hidden, kv_width),  # value
        (hidden, hidden),  # attention output
        (hidden, inner),  # gate
        (hidden, inner),  # up
        (inner, hidden),  # down
    ]
    num_layers = config.num_hidden_layers
    frozen_weights = num_layers * sum(a * b for a, b in shapes)
    lora_weights = num_layers * sum((a + b) * LORA["lora_r"] for a, b in shapes)

    records = json.loads((folder / "train.json").read_text())
    num_tokens = num_trained = 0
    attended = 0.0  # pairs of a query and a key
    for record in records:
        turns = [Message("user", f"<image>\n{record['instruction']}")]
        prefix, answers = prompt.render_branches(turns, record["responses"])
        # The prefix contains one token for the image, which becomes 196.
        prefix_length = len(prefix.input_ids) + 195
        answer_lengths = [len(answer) for answer in answers]
        num_trained += sum(answer_lengths)
        num_tokens += prefix_length + sum(answer_lengths)
        attended += prefix_length**2 / 2
        for length in answer_lengths:
            attended += length * (prefix_length + length / 2)
    # Two matrix products (the scores and the weighted sums) cost two FLOPs each per pair and channel, three times:
    # forward, and for the gradients of both factors.
    attention = 12 * attended * hidden * num_layers
    layers = num_tokens * (4 * frozen_weights + 6 * lora_weights)
    head = 4 * num_trained * hidden * config.vocab_size
    return images / len(records) * (layers + attention + head)


# ---- the table ----


def choose_peers(names: list[str] | None) -> dict[str, str]:
    """Return the sides that ours is compared with, and the heads of their columns.

    Args:
        names: Keys of `TRAINING_PEERS`; None: the peers of our own environment.
    """
    if not names:
        return PEERS
    # The Trainer stays, because the losses of all sides are compared with its loss.
    return {TRAINER: PEERS[TRAINER]} | {name: f"x {TRAINING_PEERS[name].name}" for name in names}


def choose_ours(names: list[str] | None) -> list[str]:
    """Return the lines of our side to measure: the first and the last if peers are named (they are slow), or all."""
    lines = list(OURS)
    return [lines[0], lines[-1]] if names else lines


def write_peer_model(folder: Path, models: Models) -> tuple[str, str]:
    """Write the stock model for the peers that have environments of their own: `stock_model` in `folder`.

    Returns:
        The texts of a prompt and of the end of an answer, as `split_prompt` returns them.
    """
    model, processor, _ = build_stock_model(folder, models)
    write_stock_model(model, processor, folder / "stock_model")
    return split_prompt(processor.tokenizer)


def measure_peer(
    folder: Path, template: tuple[str, str], name: str, batch: int, steps: int
) -> dict[str, Any]:
    """Measure one side that has an environment of its own.

    Args:
        folder: Folder of the data and of `stock_model`.
        template: What `write_peer_model` returns.
        name: A key of `TRAINING_PEERS`.
        batch: Captions per step.
        steps: Number of steps.

    Returns:
        What `run_peer` returns.
    """
    peer = TRAINING_PEERS[name]
    prompt, answer_end = template
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        data = root / "messages.json"
        write_messages(folder, data, peer.image_text)
        run = PeerRun(
            model=str(folder / "stock_model"),
            data=str(data),
            output=str(root / "output"),
            prompt=prompt,
            answer_end=answer_end,
            batch=batch,
            steps=steps,
            dtype=compute_dtype(),
            learning_rate=LEARNING_RATE,
            lora_r=LORA["lora_r"],
            lora_alpha=LORA["lora_alpha"],
        )
        return run_peer(peer, run, root)


def run_sides(
    args: argparse.Namespace, folder: Path, models: Models, images: int, captions: int
) -> Results:
    """Return the runs of each side, with the same captions per update."""
    steps = WARM_UP_STEPS + 1 + args.steps
    results: Results = {name: [] for name in (*choose_peers(args.peer), *choose_ours(args.peer))}
    template = write_peer_model(folder, models) if args.peer else ("", "")
    for _ in range(args.rounds):
        for name, runs in results.items():
            # A batch counts images if captions share their prefix, and captions otherwise.
            shares_prefix = name in OURS and OURS[name].get("share_prefix", True)
            batch = images if shares_prefix else images * captions
            if name in TRAINING_PEERS:
                runs.append(measure_peer(folder, template, name, batch, steps))
            else:
                arguments = ["--steps", args.steps, "--run", folder, *models, name, batch]
                run_child(__file__, *arguments, name=name)
                runs.append(json.loads((folder / "result.json").read_text()))
            print(f"{name}: {runs[-1]['seconds']:.2f} s per step", file=sys.stderr, flush=True)
    return results


def print_versions(results: Results) -> None:
    """Print the versions of our side and of the peers, if the peers have environments of their own."""
    compared = [runs[0]["versions"] for runs in results.values() if "versions" in runs[0]]
    if not compared:
        return
    print()
    for versions in (installed_versions(OUR_PACKAGE), *compared):
        print(", ".join(f"{package} {number}" for package, number in versions.items()))


def print_table(
    results: Results, peers: dict[str, str], captions: int, samples: int, flops: float
) -> None:
    """Print the best run of each side; exit if the first loss of a side differs."""
    best = {}
    limits = []
    for name, runs in results.items():
        best[name] = min(runs, key=lambda run: run["seconds"])
        limits += [run["limit"] for run in runs]
    stock = best[TRAINER]
    print(f"\n{captions} caption(s) per image, {samples} captions per update, {compute_dtype()}")
    heads = ["captions/s", *peers.values(), "memory", "first loss", "of matmul"]
    widths = [max(12, len(head) + 2) for head in heads]
    print(f"{'':32}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths)))
    last = list(best)[-1]  # the side that `step_flops` describes
    for name, run in best.items():
        values = [f"{samples / run['seconds']:.2f}"]
        values += [f"{best[peer]['seconds'] / run['seconds']:.2f}" for peer in peers]
        values += [f"{run['memory'] / stock['memory']:.2f}", f"{run['loss']:.4f}"]
        if name == last:
            values.append(f"{flops / run['seconds'] / max(limits):.0%}")
        label = TRAINING_PEERS[name].name if name in TRAINING_PEERS else name
        print(f"{label:32}" + "".join(f"{value:>{width}}" for value, width in zip(values, widths)))
        if abs(run["loss"] / stock["loss"] - 1) > 0.01:
            sys.exit(
                f"{label}: the first loss differs from the stock model's; the comparison is not valid"
            )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", type=Path, help="Folder of SmolLM2-135M-Instruct")
    parser.add_argument(
        "--captions", type=int, nargs="+", default=[1, 5], help="Captions per image"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=4,
        help="Images per batch; half as many if they have several captions (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=2, help="Number of measured steps")
    parser.add_argument("--rounds", type=int, default=1, help="Number of runs of each side")
    parser.add_argument(
        "--peer",
        nargs="+",
        choices=list(TRAINING_PEERS),
        help="Compare with these programs, each installed into a virtual environment of its own, in "
        "place of TRL and the tutorial",
    )
    parser.add_argument("--output", type=Path, help="JSON file for all runs and versions")
    parser.add_argument("--run", nargs=5, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Run the benchmark, or one side of it."""
    args = build_parser().parse_args()
    steps = WARM_UP_STEPS + 1 + args.steps
    if args.run:
        folder, language_model, tower, name, batch = args.run
        result = run_side(Path(folder), (language_model, tower), name, int(batch), steps)
        (Path(folder) / "result.json").write_text(json.dumps(result))
        return
    for name in args.peer or ():
        create_environment(TRAINING_PEERS[name])  # before anything is measured
    all_results: dict[int, Results] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        # Standard output is for the tables only, but libraries print while they load.
        with contextlib.redirect_stdout(sys.stderr):
            language_model, tower = write_models(root, args.language_model)
        models = (str(language_model), str(tower))
        for captions in args.captions:
            folder = root / str(captions)
            folder.mkdir()
            images = args.batch if captions == 1 else args.batch // 2
            write_data(folder, images * steps, captions)
            with contextlib.redirect_stdout(sys.stderr):
                write_projector(folder, models)
                results = run_sides(args, folder, models, images, captions)
            if not all_results:
                print_versions(results)
            all_results[captions] = results
            flops = step_flops(folder, models, images)
            print_table(results, choose_peers(args.peer), captions, images * captions, flops)
    if args.output:
        ours = installed_versions(OUR_PACKAGE)
        report = {"versions": ours, "dtype": compute_dtype(), "captions_per_image": all_results}
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
