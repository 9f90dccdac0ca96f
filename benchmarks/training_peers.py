"""Programs that bench_train.py compares a training step with, each in its own virtual environment.

Every peer trains the stock LLaVA model that our comparison with TRL assembles, saved as a folder, on the same
images and texts. No peer has a template for this language model, so the script of each peer registers one, whose text
is taken from the chat template of the tokenizer. Prompts and labels are then the same tokens on all sides.

Two programs are missing here. unsloth 2026.10 trains text models on a CPU, but its vision models need a GPU.
axolotl 0.19 requires packages with GPU kernels (xformers, Triton, Liger, flash-linear-attention) and warns that
training in bfloat16 fails without a GPU that supports it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peer_environment import create_peer_python, peer_cache

HERE = Path(__file__).parent
CONTENT = "CONTENT"  # stands for the user's message in a prompt


@dataclass(frozen=True)
class TrainingPeer:
    """A program that trains LLaVA models.

    Attributes:
        name: Its name, as the table shows it.
        requirement: What pip installs, with the version.
        script: File in this folder that runs in its environment.
        image_text: What stands for the image in a message. A peer may add the line break itself.
        optional: Packages that are installed with it, but that it can do without.
    """

    name: str
    requirement: str
    script: str
    image_text: str = "<image>\n"
    optional: tuple[str, ...] = ()


TRAINING_PEERS = {
    "llama-factory": TrainingPeer(
        name="LLaMA-Factory",
        requirement="llamafactory==0.9.5",
        script="peer_llama_factory.py",
        # The wheels on PyPI are built with CUDA and cannot be imported beside a CPU build of torch.
        optional=("torchvision", "torchaudio"),
    ),
    "ms-swift": TrainingPeer(
        name="ms-swift",
        requirement="ms-swift==4.6.0",
        script="peer_ms_swift.py",
        image_text="<image>",
    ),
}


@dataclass(frozen=True)
class PeerRun:
    """What the script of a peer reads: one run, in terms that all peers share.

    Attributes:
        model: Folder of the stock LLaVA model and its processor.
        data: JSON file of records with `messages` and `images`.
        output: Folder that the peer may write to.
        prompt: Text of a prompt, with `CONTENT` in the place of the user's message.
        answer_end: Text of the token that ends an answer and is trained with it.
        batch: Captions per step.
        steps: Number of steps.
        dtype: "bfloat16" or "float32".
        learning_rate: Maximum learning rate.
        lora_r: Rank of LoRA.
        lora_alpha: Scale of LoRA, times its rank.
    """

    model: str
    data: str
    output: str
    prompt: str
    answer_end: str
    batch: int
    steps: int
    dtype: str
    learning_rate: float
    lora_r: int
    lora_alpha: int


def shared_arguments(run: PeerRun) -> dict[str, Any]:
    """Return the arguments of `transformers.TrainingArguments` that all peers get, so that their steps are the same."""
    return {
        "per_device_train_batch_size": run.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": run.steps,
        "learning_rate": run.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "bf16": run.dtype == "bfloat16",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


# ---- our environment: write what a peer reads, and start it ----


def create_environment(peer: TrainingPeer) -> Path:
    """Return the Python of a peer's virtual environment, which is created if it is missing.

    It gets the same build of torch as ours. Without that, pip would fetch several gigabytes of CUDA.
    """
    folder = peer_cache() / peer.requirement.replace("==", "-")
    constraints = [f"torch=={version('torch')}"]
    return create_peer_python(folder, [peer.requirement], constraints, peer.optional)


def split_prompt(tokenizer: Any) -> tuple[str, str]:
    """Return the text of a prompt, with `CONTENT` in it, and the text that ends an answer."""
    turns = [{"role": "user", "content": CONTENT}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return prompt, tokenizer.eos_token


def write_stock_model(model: Any, processor: Any, folder: Path) -> None:
    """Write a stock LLaVA model that was assembled in memory, and its processor."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    # Only a model that was loaded from files has this mapping. Without it, the weights of the tower would be saved
    # under incomplete names.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_messages(folder: Path, output: Path, image_text: str) -> None:
    """Write the records of `train.json` as messages, one record per caption.

    Args:
        folder: Folder of `train.json` and its images.
        output: JSON file to write.
        image_text: What stands for the image in a message.
    """
    samples = []
    for record in json.loads((folder / "train.json").read_text()):
        question = {"role": "user", "content": image_text + record["instruction"]}
        for caption in record["responses"]:
            answer = {"role": "assistant", "content": caption}
            image = str(folder / record["image"])
            samples.append({"messages": [question, answer], "images": [image]})
    output.write_text(json.dumps(samples))


def run_peer(peer: TrainingPeer, run: PeerRun, folder: Path) -> dict[str, Any]:
    """Measure one run of a peer, in its virtual environment.

    Args:
        peer: The peer.
        run: What to train.
        folder: An existing folder for the files of the run and for the caches of the peer.

    Returns:
        What `step_times.summarize` returns, and the "versions" of the packages.
    """
    run_file, result_file = folder / "run.json", folder / "result.json"
    run_file.write_text(json.dumps(asdict(run)))
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)  # our packages are not those of the peer
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "MODELSCOPE_CACHE": str(folder / "modelscope"),
        "DO_NOT_TRACK": "1",
    }
    python = create_environment(peer)
    command = [str(python), str(HERE / peer.script), str(run_file), str(result_file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        sys.exit(f"{peer.name} failed:\n{(done.stdout + done.stderr)[-5000:]}")
    return dict(json.loads(result_file.read_text()))


# ---- the environment of a peer ----


def read_run() -> tuple[PeerRun, Path]:
    """Return the run that the command line of a peer's script names, and the file for its result."""
    run_file, result_file = map(Path, sys.argv[1:])
    return PeerRun(**json.loads(run_file.read_text())), result_file


def installed_versions(package: str) -> dict[str, str]:
    """Return the versions of a program and of the libraries that a training step runs in."""
    return {name: version(name) for name in (package, "torch", "transformers", "peft")}


def write_result(file: Path, summary: dict[str, float], package: str) -> None:
    """Write what was measured, and the versions of the packages that matter for it."""
    file.write_text(json.dumps(summary | {"versions": installed_versions(package)}))
