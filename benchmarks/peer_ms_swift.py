"""Run ms-swift as its README does, in its own virtual environment. Started by bench_train.py --peer.

    python peer_ms_swift.py RUN.json RESULT.json

Settings that differ from its defaults, and why:

- Gradient checkpointing is off: it costs a second forward pass, and no other side has it.
- The template is registered here: that of LLaVA 1.5 is Vicuna's, and `chatml` also trains the line break
  after an answer.
- The projector is trained, as on all sides: LoRA leaves it frozen unless `modules_to_save` names it.
- The optimizer has the settings of transformers' Trainer, which all sides share.
- No packing and no padding-free batches: both need FlashAttention. No Liger kernels: they need a GPU.

Two of its defaults make it faster: `use_logits_to_keep` computes logits from the first trained position on, and
a worker process reads the images and the texts ahead. The memory of that process is not counted.
"""

from __future__ import annotations

from typing import Any

from training_peers import CONTENT, PeerRun, read_run, shared_arguments, write_result

TEMPLATE = "benchmark"


def training_arguments(run: PeerRun) -> dict[str, Any]:
    """Return the arguments of `swift sft`."""
    return {
        "model": run.model,
        "model_type": "llava1_5_hf",
        "check_model": False,  # it would look for a newer version on ModelScope
        "template": TEMPLATE,
        "tuner_type": "lora",
        "lora_rank": run.lora_r,
        "lora_alpha": run.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": ["all-linear"],  # of the language model: the other parts are frozen
        "modules_to_save": ["multi_modal_projector"],
        "freeze_vit": True,
        "freeze_aligner": True,
        "dataset": [run.data],
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "output_dir": run.output,
        "add_version": False,
        **shared_arguments(run),
        "weight_decay": 0.0,
        "adam_beta2": 0.999,
        "torch_dtype": run.dtype,
        "fp16": False,
        "attn_impl": "sdpa",
        "gradient_checkpointing": False,
        "report_to": ["none"],
    }


def register_prompt(run: PeerRun) -> None:
    """Register a template with the prompt of the run."""
    from swift.template import TemplateMeta, register_template
    from swift.template.templates.llava import LlavaHfTemplate

    register_template(
        TemplateMeta(
            TEMPLATE,
            prefix=[],
            prompt=[run.prompt.replace(CONTENT, "{{QUERY}}")],
            chat_sep=None,
            suffix=[run.answer_end],
            template_cls=LlavaHfTemplate,
        )
    )


def main() -> None:
    """Train, and write what was measured."""
    run, result_file = read_run()

    from step_times import Step, record_steps, summarize
    from swift import SftArguments, sft_main

    steps: list[Step] = []
    record_steps(steps)
    register_prompt(run)
    sft_main(SftArguments(**training_arguments(run)))
    write_result(result_file, summarize(steps, run.dtype), "ms-swift")


if __name__ == "__main__":
    main()
