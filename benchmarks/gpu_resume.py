"""Section "resume" of `bench_gpu.py`: time to save and load a LoRA checkpoint, and exactness of a resumed run."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from gpu_exactness import relative_difference
from gpu_report import Report, Values, free_memory
from gpu_training import build_adapted, build_our_trainer, make_arguments
from gpu_workload import Workload

STEPS = 3


def run(workload: Workload, report: Report) -> None:
    """Run the section."""
    report.attempt("save, load and resume", partial(measure, workload))


def measure(workload: Workload) -> Values:
    """Train 3 steps. Then resume from the checkpoint of step 2 with a new model, and compare the weights at the end."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        values, expected = _train_and_save(workload, folder / "run")
        # Free the first model, because two would not fit into the memory.
        free_memory()
        checkpoint = folder / "run" / f"checkpoint-{STEPS - 1}"
        resumed, actual = _resume(workload, checkpoint, folder / "resumed")
        sizes = [path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()]
    # On a GPU, some kernels add numbers in a random order, so the difference need not be exactly 0.
    differences = [relative_difference(actual[name], weight) for name, weight in expected.items()]
    return {
        **values,
        **resumed,
        "checkpoint bytes": sum(sizes),
        "difference of weights": max(differences),
    }


def _options(workload: Workload, **changes: Any) -> dict[str, Any]:
    """Return the training options that both runs share, with additional ones."""
    return {
        "max_steps": STEPS,
        "per_device_train_batch_size": workload.pick(8, 2),
        "learning_rate": 1e-3,
        **changes,
    }


def _trained_weights(model: Any) -> dict[str, Any]:
    """Return copies of the trained weights on the CPU."""
    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weights[name] = parameter.detach().cpu()
    return weights


def _train_and_save(workload: Workload, folder: Path) -> tuple[Values, dict[str, Any]]:
    """Train all steps, and save a checkpoint before the last one.

    Returns:
        The seconds of saving the checkpoint, and the trained weights at the end.
    """
    model = build_adapted(workload, workload.large)
    options = _options(workload, save_strategy="steps", save_steps=STEPS - 1)
    args = make_arguments(str(folder), workload, **options)
    trainer = build_our_trainer(workload, model, args, captions=1, parts="adapter")
    seconds = 0.0
    save = trainer._save_checkpoint

    def timed_save(*args: Any, **kwargs: Any) -> None:
        nonlocal seconds
        workload.synchronize()
        start = time.perf_counter()
        save(*args, **kwargs)
        # The trainer saves a second checkpoint at the end. Keep the duration of the first one.
        seconds = seconds or time.perf_counter() - start

    trainer._save_checkpoint = timed_save
    trainer.train()
    return {"save, s": seconds}, _trained_weights(model)


def _resume(workload: Workload, checkpoint: Path, folder: Path) -> tuple[Values, dict[str, Any]]:
    """Build a new model, load the checkpoint, and train the last step.

    Returns:
        The seconds of building the model and of loading the checkpoint, and the trained weights at the end.
    """
    from llava_simplified.model.checkpoint import load_trained_weights

    start = time.perf_counter()
    model = build_adapted(workload, workload.large)
    workload.synchronize()
    built = time.perf_counter()
    load_trained_weights(model, checkpoint)
    workload.synchronize()
    loaded = time.perf_counter()
    args = make_arguments(str(folder), workload, **_options(workload))
    trainer = build_our_trainer(workload, model, args, captions=1, parts="adapter")
    trainer.train(resume_from_checkpoint=str(checkpoint / "trainer_state"))
    values = {"build, s": built - start, "load, s": loaded - built}
    return values, _trained_weights(model)
