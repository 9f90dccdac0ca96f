"""`transformers.Trainer` with LLaVA's loss, parameter groups, evaluation and checkpoints.

The base class implements the loop, the engines (DDP, ZeRO, FSDP), mixed precision and callbacks. This
class overrides the parts that differ for LLaVA:

    training step   mean loss over the tokens of a step; values that are not finite end the run
    evaluation      mean loss over the tokens of the set; captions of a few images
    optimizer       learning rates of projector, vision tower and language model
    saving          checkpoints that `Llava.from_pretrained` can load, written atomically
    resuming        weights and optimizer state in a format that does not depend on the engine
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from llava_simplified.arguments import TrainingArguments
from llava_simplified.data.collate import Batch, Collator
from llava_simplified.data.dataset import CaptionDataset
from llava_simplified.data.device_copy import to_device
from llava_simplified.data.packing import PackedDataset
from llava_simplified.data.samplers import LengthGroupedSampler
from llava_simplified.jobs import rename_folder, replace_folder, use_default_permissions
from llava_simplified.model.checkpoint import copy_checkpoint, save_checkpoint
from llava_simplified.model.config import LlavaConfig, TrainedParts
from llava_simplified.model.llava import Llava
from llava_simplified.training.callbacks import (
    GradientNormMonitor,
    SampleWarnings,
    ThroughputMeter,
    progress_callback,
)
from llava_simplified.training.eval_captions import FOLDER as EVAL_CAPTIONS_FOLDER
from llava_simplified.training.eval_captions import EvalCaptions
from llava_simplified.training.interruption import InterruptionCallback, ignore_interrupts
from llava_simplified.training.optimizer import build_parameter_groups, load_scheduler_state
from llava_simplified.training.resume import OPTIMIZER_FILE, list_checkpoints
from llava_simplified.training.sharding import (
    enable_fsdp_on_cpu,
    full_optimizer_state_dict,
    full_state_dict,
    load_optimizer_state_dict,
)

logger = logging.getLogger(__name__)

TrainingSet = CaptionDataset | PackedDataset
# The arguments of `Llava.forward`: a batch of `Collator` without its metadata.
ModelInputs = dict[str, torch.Tensor]

MAX_LISTED_SAMPLES = 16
LOG_FILE = "trainer_log.jsonl"  # in the output folder of a run


class LlavaTrainer(transformers.Trainer):
    """Train a `Llava`.

    Args:
        model: The model; `requires_grad` is set for the trained parameters.
        args: Training options.
        config: Config of the model, written into every checkpoint.
        parts: The trained parts, which a checkpoint contains.
        settings: Options of the run, written into every checkpoint and compared when the run is
            resumed.
        max_bad_images: Maximum fraction of unreadable images.
        train_dataset: Examples, or packs of examples.
        eval_dataset: Validation examples.
        data_collator: Collates examples into batches.

    Attributes:
        last_checkpoint: The checkpoint that this run has saved last, or from which it was resumed.
    """

    args: TrainingArguments

    def __init__(
        self,
        model: Llava,
        args: TrainingArguments,
        config: LlavaConfig,
        parts: TrainedParts,
        settings: Mapping[str, Any],
        max_bad_images: float,
        train_dataset: TrainingSet,
        eval_dataset: CaptionDataset | None,
        data_collator: Collator,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=cast(Any, data_collator),
        )
        for stock_callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(stock_callback)
        self.add_callback(progress_callback(args.disable_tqdm))
        if args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self.throughput = ThroughputMeter()
        self.add_callback(self.throughput)
        self.interruption = InterruptionCallback()
        self.add_callback(self.interruption)
        self.gradient_norms = GradientNormMonitor()
        self.sample_warnings = SampleWarnings(
            max_bad_images,
            log=self.accelerator.is_local_main_process,
        )
        self.eval_captions = self._create_eval_captions(eval_dataset)
        best_by_cider = (args.metric_for_best_model or "").endswith("cider")
        if best_by_cider and not self.eval_captions:
            raise ValueError(
                "--metric_for_best_model cider requires captions of validation images. Pass --eval_captions 32, or "
                "--metric_for_best_model eval_loss."
            )
        self.llava_config = config
        self.parts = parts
        self.settings = dict(settings)
        # Prevent the base class from scaling the loss, which `compute_loss` has scaled already.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = True
        self._step_sample_ids: list[str] = []
        # Losses of micro-batches that have not been read from the device, with the names of their samples.
        self._unchecked_losses: list[tuple[torch.Tensor, list[str]]] = []
        self.last_checkpoint: Path | None = None
        self._staging: Path | None = None  # set while a checkpoint is being written
        # The last value of `self.model`, and the same model without wrappers.
        self._unwrapped: tuple[object, object] = (None, None)

    @property
    def unwrapped_model(self) -> Llava:
        """The model without the wrappers of engines and compilers."""
        # Remember it, because `unwrap_model` visits every module. The policy trainer needs it for each sample.
        wrapped, unwrapped = self._unwrapped
        if wrapped is not self.model:
            unwrapped = self.accelerator.unwrap_model(self.model)
            self._unwrapped = self.model, unwrapped
        return cast(Llava, unwrapped)

    @property
    def weights_are_sharded(self) -> bool:
        """True if no process has all the weights, as with ZeRO-3 and FSDP."""
        deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None)
        is_zero_3 = deepspeed is not None and deepspeed.zero_stage == 3
        return self.is_fsdp_enabled or is_zero_3

    @property
    def output_dir(self) -> Path:
        """Output folder of the run."""
        return Path(str(self.args.output_dir))

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator; FSDP is enabled on CPUs too."""
        # Queue the copies of batches to a GPU instead of waiting for them. The data loader has pinned
        # their memory, which such copies require.
        if self.args.device.type == "cuda" and self.args.dataloader_pin_memory:
            cast(Any, self.args.accelerator_config).non_blocking = True
        super().create_accelerator_and_postprocess()
        enable_fsdp_on_cpu(self.accelerator, self.args.fsdp_plugin_args or {})
        self.is_fsdp_enabled = self.accelerator.distributed_type == DistributedType.FSDP

    # ---- training step ----
    #
    # An optimizer step consists of several micro-batches, on several processes, and each of them
    # has a different number of trained tokens. The step minimizes the mean over *all* of its
    # tokens:
    #
    #     2 processes, 2 micro-batches each; in brackets: trained tokens
    #
    #     process 0    micro-batch 0 (10)    micro-batch 1 (30)
    #     process 1    micro-batch 0 (20)    micro-batch 1 (40)        all together: 100
    #
    #     loss of a micro-batch = sum of its token losses / 100 * 2 processes
    #
    # `backward` adds up the gradients of a process. The engine then averages over the processes,
    # which cancels the factor 2. The result is the gradient of (sum of 100 token losses) / 100,
    # however the step is divided. Averaging the means of the micro-batches instead would give a token
    # of a short caption more weight than a token of a long one.
    #
    # The weights are never updated with values that are not finite. The losses of a step and the norm of
    # the gradient are read together before the optimizer step. If any of them is not finite, the run ends with an
    # error that names the samples and the last good checkpoint.

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """Fetch the micro-batches of one step, and count its items (see `count_items`) over all processes.

        Returns:
            The micro-batches of this process, and the number of items of the step, a scalar tensor.
        """
        # Stop a finished run that is resumed, which the base class would train for one more step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], torch.zeros(())
        self.throughput.start_step()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = self.prepare_micro_batches(batches)
        self._step_sample_ids = []
        items = tokens = positions = 0
        for batch in batches:
            metadata = batch["metadata"]
            self.sample_warnings.add(batch)
            self._step_sample_ids += metadata["ids"]
            items += self.count_items(batch)
            tokens += metadata["tokens"]
            positions += batch["input_ids"].numel()
        samples = len(self._step_sample_ids)
        has_signal = int(self.interruption.signal is not None)
        counts = torch.tensor([items, samples, tokens, positions, has_signal])
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(to_device(counts, device), "sum")
            # Reading this count waits for the device, once per step. The processes need it, because all of
            # them must stop after the same step.
            num_signals = counts[4]
            self.interruption.is_agreed = bool(num_signals > 0)
        self.throughput.add(counts[1:4])  # samples, tokens and positions
        total_items = counts[0]
        return batches, total_items

    # Objectives other than cross entropy override the following three methods.

    def prepare_micro_batches(self, batches: list[Batch]) -> list[Batch]:
        """Return the micro-batches to train on. Subclasses may replace those that were loaded."""
        return batches

    def count_items(self, batch: Mapping[str, Any]) -> int:
        """Return the number of items that the loss of a step is averaged over: here its tokens."""
        return len(batch["labels"])

    def summed_loss(self, model: nn.Module, inputs: ModelInputs) -> tuple[torch.Tensor, Any]:
        """Return the loss of a micro-batch, summed over its items, and the outputs of the model.

        Args:
            model: The prepared model.
            inputs: A batch without its metadata.
        """
        outputs = model(**inputs)
        return outputs.loss, outputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch, scaled for the step; see the comment above.

        Args:
            model: The prepared model.
            inputs: A batch of `Collator`; its metadata is removed.
            return_outputs: Return the model's outputs too.
            num_items_in_batch: Number of items (see `count_items`) of the step on all processes; None:
                average over this batch only.

        Raises:
            FloatingPointError: The loss is not finite (with DeepSpeed only; see `_get_grad_norm`).
        """
        ids = inputs.pop("metadata")["ids"]
        summed, outputs = self.summed_loss(model, inputs)
        if num_items_in_batch is None:
            loss = summed / self.count_items(inputs)
        else:
            # Cancel the averaging of gradients over the processes, since the items were counted over all
            # of them.
            loss = summed / num_items_in_batch * self.accelerator.num_processes
        self._unchecked_losses.append((loss.detach(), ids))
        # DeepSpeed updates the weights within `backward`; all others after `_get_grad_norm`.
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._check_losses()
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the gradient; end the run if it is not finite, warn if it is unusual.

        The base class calls this before the optimizer step.

        Raises:
            FloatingPointError: The loss of a micro-batch or the norm is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, torch.Tensor) and not self.args.fp16:
            norm = self._check_losses(norm)
        else:
            self._check_losses()
        # Do not check the norm with fp16, where an infinite norm means that the loss scale is too
        # large: the scaler skips the step and lowers the scale.
        if norm is None or self.args.fp16:
            return norm
        value = float(norm)
        if not math.isfinite(value):
            what = f"the norm of the gradient is {value}"
            raise FloatingPointError(self._describe_divergence(what, self._step_sample_ids))
        warning = self.gradient_norms.check(value)
        if warning and self.accelerator.is_local_main_process:
            samples = _list_samples(self._step_sample_ids)
            logger.warning("step %d: %s; samples %s", self.state.global_step + 1, warning, samples)
        return norm

    def _check_losses(self, norm: torch.Tensor | None = None) -> float | None:
        """End the run if a loss since the last call is not finite.

        Reading a value waits for the device. All values of a step are therefore read together, once, and
        as late as possible: the host can queue forward and backward of all micro-batches without a pause.

        Args:
            norm: The norm of the gradient, to be read together with the losses.

        Returns:
            The norm.

        Raises:
            FloatingPointError: A loss is not finite.
        """
        unchecked, self._unchecked_losses = self._unchecked_losses, []
        values = [loss.float() for loss, _ in unchecked]
        if norm is not None:
            # With FSDP, the norm is a sharded tensor, a DTensor.
            full_norm = getattr(norm, "full_tensor", lambda: norm)()
            values.append(full_norm.detach().to(self.args.device, torch.float32).reshape(()))
        if not values:
            return None
        numbers = torch.stack(values).tolist()
        # If there is a norm, it is the last number, after the losses.
        for loss, (_, ids) in zip(numbers, unchecked):
            if not math.isfinite(loss):
                raise FloatingPointError(self._describe_divergence(f"the loss is {loss}", ids))
        return None if norm is None else numbers[-1]

    def _describe_divergence(self, what: str, ids: Sequence[str]) -> str:
        """Return the error message of a run that ends because of a value that is not finite."""
        last = self.last_checkpoint or "none yet"
        return (
            f"{what} at step {self.state.global_step + 1}, samples {_list_samples(ids)}; last good checkpoint: {last}. "
            "Lower --learning_rate; if the run uses --fp16 True, pass --bf16 True instead."
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log values with the throughput, and append one JSON line to `trainer_log.jsonl`."""
        if "loss" in logs:
            logs |= self.throughput.read()
        super().log(logs, *args, **kwargs)
        if not self.is_world_process_zero():
            return
        row = {"step": self.state.global_step, **self.state.log_history[-1]}
        with (self.output_dir / LOG_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    # ---- evaluation ----
    #
    # The validation loss does not depend on the batch size or on the number of processes: losses
    # are summed over tokens, and every sample is counted once (see `drop_padding_samples`).

    def evaluation_loop(
        self,
        dataloader: DataLoader[Batch],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compute the validation loss: the mean over all tokens of the set. Logits are discarded."""
        model = self._wrap_model(cast(nn.Module, self.model), training=False)
        model.eval()
        # (2,): sum of the token losses, number of tokens. Apple's GPUs have no float64.
        on_mps = self.args.device.type == "mps"
        dtype = torch.float32 if on_mps else torch.float64
        totals = torch.zeros(2, device=self.args.device, dtype=dtype)
        for batch in dataloader:
            self.sample_warnings.add(batch)
            inputs = cast(ModelInputs, {**batch})
            del inputs["metadata"]
            inputs = self._prepare_inputs(self.drop_padding_samples(inputs))
            with torch.no_grad(), self.compute_loss_context_manager():
                loss_sum = model(**inputs).loss.to(dtype)
                token_count = totals.new_tensor(len(inputs["labels"]))
                totals += torch.stack([loss_sum, token_count])
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss_sum, token_count = self.accelerator.reduce(totals, "sum").tolist()
        loss = loss_sum / token_count
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            # Avoid an overflow: exp(710) is too large for a double.
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700)),
        }
        if self.eval_captions:
            metrics[f"{metric_key_prefix}_cider"] = self._write_captions(self.eval_captions)
        samples = self.num_examples(dataloader)
        return EvalLoopOutput(None, None, metrics, samples)  # type: ignore[arg-type]

    def drop_padding_samples(self, inputs: ModelInputs) -> ModelInputs:
        """Remove the labels of repeated samples in the last batches.

        Args:
            inputs: A batch without its metadata.
        """
        # All processes need the same number of batches. Accelerate completes the last ones with copies
        # of the first samples, which would be counted twice:
        #
        #     5 samples, 2 processes, batches of 2     process 0    process 1
        #     first batches                            0  1         2  3
        #     last batches (remainder: 1)              4 (0)        (1) (2)      in brackets: copies
        #
        # Keep the rows in the batch, because all processes must run the same layers, and drop only
        # their labels.
        state = self.accelerator.gradient_state
        is_filled_up = state.end_of_dataloader and state.remainder > 0
        if not is_filled_up:
            return inputs
        rows, length = inputs["input_ids"].shape
        # `remainder` counts the real samples of the last batches of all processes together.
        real_rows = state.remainder - self.accelerator.process_index * rows
        is_real = inputs["logit_positions"] // length < real_rows
        return {
            **inputs,
            "logit_positions": inputs["logit_positions"][is_real],
            "labels": inputs["labels"][is_real],
        }

    def _create_eval_captions(self, eval_dataset: CaptionDataset | None) -> EvalCaptions | None:
        """Return the validation images that are captioned, or None if there are none."""
        args = self.args
        if args.eval_strategy == "no" or not args.eval_captions or eval_dataset is None:
            return None
        if self.weights_are_sharded:
            # One process generates the captions, but no process has all the weights.
            if self.accelerator.is_local_main_process:
                logger.warning(
                    "--eval_captions: no captions are generated, because ZeRO-3 and FSDP shard the weights"
                )
            return None
        captions = EvalCaptions(eval_dataset, args.eval_captions, self.output_dir)
        return captions if captions.rows else None

    def _write_captions(self, captions: EvalCaptions) -> float:
        """Caption the validation images in the first process; return CIDEr-D in all of them."""
        score = torch.zeros((), device=self.args.device)
        if self.is_world_process_zero():
            step, callbacks = self.state.global_step, self.callback_handler.callbacks
            score += captions.write(self.unwrapped_model, step, callbacks)
        # Send the score to all processes. The others wait here, and each adds 0 to the sum.
        return self.accelerator.reduce(score, "sum").item()

    # ---- order of the samples ----

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        """Return the default sampler, or one that groups examples of similar length."""
        dataset = train_dataset or cast("Dataset[Any]", self.train_dataset)
        if self.args.train_sampling_strategy == "group_by_length":
            return self._length_grouped_sampler(dataset, self.args.train_batch_size)
        return super()._get_train_sampler(dataset)

    def _get_eval_sampler(self, eval_dataset: Dataset[Any]) -> Sampler[int] | None:
        if self.args.train_sampling_strategy == "group_by_length":
            return self._length_grouped_sampler(eval_dataset, self.args.eval_batch_size)
        return super()._get_eval_sampler(eval_dataset)

    def _length_grouped_sampler(
        self, dataset: Dataset[Any], batch_size: int
    ) -> LengthGroupedSampler:
        """Return a sampler that puts examples of similar length into one batch."""
        tokens_per_image = self.unwrapped_model.vision_tower.num_tokens
        lengths = cast(TrainingSet, dataset).lengths(tokens_per_image)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # Group over all processes: they wait for each other in every step, so their batches should have
        # similar lengths too.
        return LengthGroupedSampler(
            cast(Sequence[int], lengths), batch_size * self.args.world_size, seed
        )

    def get_eval_dataloader(
        self, eval_dataset: str | Dataset[Any] | None = None
    ) -> DataLoader[Batch]:
        """Return a data loader of all validation samples, whatever `--dataloader_drop_last` is."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _get_dataloader(self, *args: Any, **options: Any) -> DataLoader[Batch]:
        """Return a data loader whose workers ignore Ctrl-C, and whose sampler is told the epoch."""
        loader = super()._get_dataloader(*args, **options)
        # `set_epoch` of the loader reaches a sampler through two batch samplers at most. With several processes, a
        # resumed run has three: SkipBatchSampler -> BatchSamplerShard -> BatchSampler -> sampler. `set_sampler` adds a
        # reference to the second one. Accelerate does this itself for its random sampler only.
        batch_sampler = cast(Any, loader.batch_sampler)
        # Only with several processes, this is a BatchSamplerShard around the batch sampler itself.
        batch_sampler = getattr(batch_sampler, "batch_sampler", batch_sampler)
        if isinstance(batch_sampler.sampler, LengthGroupedSampler):
            cast(Any, loader).set_sampler(batch_sampler.sampler)
        loader.worker_init_fn = partial(ignore_interrupts, then=loader.worker_init_fn)
        return loader

    # ---- optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer with the learning rates of projector, tower and language model."""
        if self.optimizer is None:
            whole_model = cast(nn.Module, self.model)
            groups = build_parameter_groups(
                (model or whole_model).named_parameters(),
                set(self.get_decay_parameter_names(whole_model)),
                self.args,
            )
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(
                self.args, cast(transformers.PreTrainedModel, self.model)
            )
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # ---- saving ----
    #
    # Every save, including intermediate ones, is a checkpoint that `Llava.from_pretrained` can load. The
    # state for resuming is in its folder `trainer_state/` (see `resume`). A checkpoint gets its final
    # name when it is complete, so that a killed run leaves no incomplete checkpoint:
    #
    #     .saving/checkpoint-20/   optimizer, random states        -> checkpoint-20/trainer_state/
    #     .saving/model/           llava.json, projector, adapter  -> checkpoint-20/
    #
    # The engines' own checkpoint formats are not used: weights and optimizer state are gathered into
    # full tensors (see `sharding`).

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a checkpoint that `Llava.from_pretrained` can load, without the trainer's state."""
        model = self.unwrapped_model
        weights = self._gather_on_main_process(full_state_dict(model, self.parts))
        if not self.args.should_save:
            return
        if self._staging:
            folder = self._staging / "model"
        else:
            folder = Path(output_dir or self.output_dir)
        progress = {"steps": self.state.global_step, "epochs": self.state.epoch}
        training = {**progress, **self.settings}
        save_checkpoint(model, folder, self.llava_config, self.parts, training, weights)

    def save_final(self) -> None:
        """Save the last weights into the output folder.

        With `--load_best_model_at_end`, copy the best checkpoint.
        """
        best = self.state.best_model_checkpoint
        if not self.args.load_best_model_at_end or best is None:
            self.save_model()
        elif self.args.should_save:
            copy_checkpoint(best, self.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write `checkpoint-N` under a temporary name, and rename it when it is complete.

        The base method writes optimizer, schedule and random states into `checkpoint-N` in the folder
        that `_get_output_dir` returns, and calls `save_model` for the weights. Both write to `.saving`.
        """
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = self.output_dir / ".saving"
        self._staging = staging
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            (staging / name).mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._publish_checkpoint(staging, name)
        self.last_checkpoint = self.output_dir / name
        self.accelerator.wait_for_everyone()

    def _publish_checkpoint(self, staging: Path, name: str) -> None:
        """Move a complete checkpoint from the staging folder to its final place."""
        # Correct the path of the best checkpoint, which the base method has set to the staging folder.
        best = self.output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best.name == name or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        self.state.save_to_json(str(staging / name / "trainer_state.json"))

        use_default_permissions(staging / name)
        # Complete the checkpoint in the staging folder; the last rename publishes it.
        rename_folder(staging / name, staging / "model" / "trainer_state")
        # A checkpoint of the same step exists if the run was resumed from an earlier one.
        replace_folder(staging / "model", self.output_dir / name)
        shutil.rmtree(staging, ignore_errors=True)
        self._delete_old_checkpoints(self.output_dir / name)

    def _delete_old_checkpoints(self, kept: Path) -> None:
        """Delete checkpoints above `--save_total_limit`, but neither `kept` nor the best one."""
        # `rotate_checkpoints` of transformers protects the checkpoint with the highest step instead. If a run is
        # resumed from an earlier checkpoint, that is not the one that was just saved.
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        best = self.state.best_model_checkpoint
        # Compare resolved paths: a resumed run may have the same output folder under another name.
        protected = {kept.resolve(), Path(best).resolve() if best else kept.resolve()}
        checkpoints = list_checkpoints(self.output_dir)
        num_excess = len(checkpoints) - max(limit, len(protected))
        unprotected = [folder for folder in checkpoints if folder.resolve() not in protected]
        for folder in unprotected[: max(num_excess, 0)]:
            shutil.rmtree(folder, ignore_errors=True)

    def _finalize_training(
        self, trial: Any, num_train_samples: int | None, start_time: float
    ) -> TrainOutput:
        """Finish a run. With `--save_total_limit 1`, a complete run keeps the best checkpoint only."""
        args = self.args
        limit = args.save_total_limit
        # With a limit of 1, the base method would delete everything but the best checkpoint: also the one that an
        # interruption has just saved, and folders that the user has renamed, such as checkpoint-500-good.
        args.save_total_limit = None
        try:
            output = super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        if limit == 1 and best and args.should_save and not self.interruption.was_stopped:
            self._delete_old_checkpoints(Path(best))
        return output

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the full optimizer state and the schedule, in the process that saves."""
        state = self._gather_on_main_process(
            full_optimizer_state_dict(self.unwrapped_model, self.optimizer)
        )
        if self.args.should_save:
            save_file(state, Path(output_dir) / OPTIMIZER_FILE)
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / "scheduler.pt")

    def _gather_on_main_process(
        self, tensors: Iterator[tuple[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Gather the tensors in all processes, and keep them in the process that saves."""
        kept = {}
        for name, tensor in tensors:
            if self.args.should_save:
                kept[name] = tensor.cpu().clone()
        return kept

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compare the metric with the best so far; save a new best with `--load_best_model_at_end`.

        The base class would save it only if the step is one of `--save_steps`.
        """
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        # With --save_strategy best, the base class saves only if this returns True. An interrupted run always saves.
        return is_best or self.interruption.was_stopped

    def _load_best_model(self) -> None:
        """Do nothing: `save_final` copies the best checkpoint, which works with all engines."""

    # ---- resuming ----
    #
    # `build_trainer` loads the trained weights into the full model, as for a new run. After the engine
    # has split the model, the state of optimizer and schedule is loaded here. The base class restores
    # step, random states and the position in the data from `trainer_state/`.

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Do nothing: `build_trainer` has loaded the weights."""

    def _load_callback_state(self) -> None:
        """Restore the counter of early stopping, but use the patience of this run."""
        super()._load_callback_state()
        # The base class has replaced the callback by one with the patience of the checkpoint.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience = self.args.early_stopping_patience

    def _prepare_for_training(
        self,
        max_steps: int,
        train_dataloader: DataLoader[Batch],
        resume_from_checkpoint: str | None,
    ) -> Any:
        """Prepare the model, and restore the optimizer, schedule and loss scale of a resumed run."""
        # Pass None instead of the folder: the base method would look for the engine's own files.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is None and self.is_world_process_zero():
            self._set_old_logs_aside()
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            self.last_checkpoint = folder.parent  # `folder` is its subfolder `trainer_state`
            optimizer = cast(torch.optim.Optimizer, self.optimizer)
            optimizer_state = load_file(folder / OPTIMIZER_FILE)
            load_optimizer_state_dict(self.unwrapped_model, optimizer, optimizer_state)
            scheduler_state = torch.load(folder / "scheduler.pt", weights_only=True)
            load_scheduler_state(cast(Any, self.lr_scheduler), optimizer, scheduler_state)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _set_old_logs_aside(self) -> None:
        """Rename the logs of an earlier run in the output folder, so that a plot or report does not mix two runs."""
        log = self.output_dir / LOG_FILE
        if log.exists():
            previous = log.with_suffix(".previous.jsonl")
            log.replace(previous)
            logger.info("The log of an earlier run is now %s.", previous)
        captions = self.output_dir / EVAL_CAPTIONS_FOLDER
        if captions.exists():
            previous = captions.with_suffix(".previous")
            replace_folder(captions, previous)
            logger.info("The captions of an earlier run are now in %s.", previous)


def _list_samples(ids: Sequence[str]) -> str:
    listed = ", ".join(ids[:MAX_LISTED_SAMPLES])
    remaining = len(ids) - MAX_LISTED_SAMPLES
    return f"{listed} and {remaining} more" if remaining > 0 else listed
