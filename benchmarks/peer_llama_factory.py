"""Run LLaMA-Factory as its README does, in its own virtual environment. Started by bench_train.py --peer.

    python peer_llama_factory.py RUN.json RESULT.json

Settings that differ from its defaults or its examples, and why:

- Gradient checkpointing is off: it costs a second forward pass, and no other side has it.
- The template is registered here, because its `chatml` template also trains the line break after an answer.
- The projector is trained, as on all sides: LoRA leaves it frozen unless `additional_target` names it.
- No packing: the lengths of the captions differ by a few tokens, so there is little padding. With packed
  sequences, sdpa on a CPU would also compute the attention scores between captions, which are masked.
- No Liger kernels and no unsloth: both need a GPU.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from training_peers import CONTENT, PeerRun, read_run, shared_arguments, write_result

TEMPLATE = "benchmark"
DATASET = "captions"


def dataset_info(data: Path) -> dict[str, Any]:
    """Return the contents of `dataset_info.json` for a file of messages and images."""
    return {
        DATASET: {
            "file_name": data.name,
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
            },
        }
    }


def training_arguments(run: PeerRun) -> dict[str, Any]:
    """Return the arguments of `llamafactory-cli train`."""
    return {
        "model_name_or_path": run.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": run.lora_r,
        "lora_alpha": run.lora_alpha,
        "lora_dropout": 0.0,
        "lora_target": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "additional_target": "multi_modal_projector",
        "freeze_vision_tower": True,
        "dataset": DATASET,
        "dataset_dir": str(Path(run.data).parent),
        "template": TEMPLATE,
        "cutoff_len": 2048,
        "disable_shuffling": True,
        "output_dir": run.output,
        **shared_arguments(run),
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": True,
        "report_to": "none",
    }


def provide_torchaudio() -> None:
    """Add an empty module torchaudio if it is missing: LLaMA-Factory imports it, but needs it only for audio."""
    if find_spec("torchaudio") is None:
        module = ModuleType("torchaudio")
        module.__spec__ = ModuleSpec("torchaudio", loader=None)
        sys.modules["torchaudio"] = module


def register_prompt(run: PeerRun) -> None:
    """Register a template with the prompt of the run."""
    from llamafactory.data.formatter import StringFormatter
    from llamafactory.data.mm_plugin import get_mm_plugin
    from llamafactory.data.template import register_template

    register_template(
        TEMPLATE,
        format_user=StringFormatter(slots=[run.prompt.replace(CONTENT, "{{content}}")]),
        format_assistant=StringFormatter(slots=["{{content}}" + run.answer_end]),
        mm_plugin=get_mm_plugin(name="llava", image_token="<image>"),
    )


def main() -> None:
    """Train, and write what was measured."""
    run, result_file = read_run()
    data = Path(run.data)
    (data.parent / "dataset_info.json").write_text(json.dumps(dataset_info(data)))

    provide_torchaudio()
    from llamafactory.train.tuner import run_exp
    from step_times import Step, record_steps, summarize

    steps: list[Step] = []
    record_steps(steps)
    register_prompt(run)
    run_exp(training_arguments(run))
    write_result(result_file, summarize(steps, run.dtype), "llamafactory")


if __name__ == "__main__":
    main()
