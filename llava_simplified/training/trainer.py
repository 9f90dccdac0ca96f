"""transformers.Trainer, with LLaVA's loss, parameter groups and checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, rotate_checkpoints

from llava_simplified.arguments import TrainingArguments
from llava_simplified.data.samplers import LengthGroupedSampler
from llava_simplified.model.checkpoint import copy_checkpoint, save_checkpoint
from llava_simplified.model.config import LlavaConfig, TrainedParts
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IMAGE_INDEX
from llava_simplified.training.callbacks import EvalCaptions, GradientAlarm, Meter, ProgressLine
from llava_simplified.training.sharding import (
    full_optimizer_state_dict,
    full_state_dict,
    load_optimizer_state_dict,
    shard_on_cpus,
)


class LlavaTrainer(transformers.Trainer):
    """What differs from training a text model, and nothing else.

    Args:
        architecture, parts, settings: written into every checkpoint.
        max_bad_images: the share of images that may be unreadable before the run stops.
    """

    args: TrainingArguments

    def __init__(
        self,
        model: Llava,
        args: TrainingArguments,
        architecture: LlavaConfig,
        parts: TrainedParts,
        settings: Mapping[str, Any],
        max_bad_images: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(model=model, args=args, **options)
        for stock in (ProgressCallback, PrinterCallback):
            self.remove_callback(stock)
        if not args.disable_tqdm:
            self.add_callback(ProgressLine())
        if args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self.meter = Meter()
        self.add_callback(self.meter)
        self.alarm = GradientAlarm()
        self.captions = self._watched_pictures()
        if not self.captions and (args.metric_for_best_model or "").endswith("cider"):
            raise ValueError(
                "--metric_for_best_model cider: there is no validation picture to caption; use eval_loss"
            )
        self.architecture = architecture
        self.parts = parts
        self.settings = dict(settings)
        self.max_bad_images = max_bad_images
        self.model_accepts_loss_kwargs = False  # the loss is scaled in compute_loss, once
        self.loss_is_scaled_for_ga = True
        self.seen = Counter[str]()
        self._ids: list[str] = []  # of this step's examples
        self._staging: Path | None = None  # while a checkpoint is being written

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        shard_on_cpus(self.accelerator, self.args.fsdp_plugin_args or {})
        self.is_fsdp_enabled = self.accelerator.distributed_type == DistributedType.FSDP

    # ---- loss ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of one step, and how many trained tokens they hold on all devices together."""
        # a finished run, resumed: the stock loop would take one step more
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], torch.zeros(())
        self.meter.begin()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self._read_notes(batch)
        self._ids = [name for batch in batches for name in batch["metadata"]["ids"]]
        counts = [
            sum(len(batch["labels"]) for batch in batches),
            len(self._ids),
            sum(batch["metadata"]["tokens"] for batch in batches),
            sum(batch["input_ids"].numel() for batch in batches),
        ]
        trained, *others = self.accelerator.reduce(
            torch.tensor(counts, device=device), "sum"
        ).unbind()
        self.meter.count(torch.stack(others))
        return batches, trained

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum of the micro-batch's token losses over the tokens of the whole step: accumulation averages tokens."""
        ids = inputs.pop("metadata")["ids"]
        outputs = model(**inputs)
        tokens = len(inputs["labels"]) if num_items_in_batch is None else num_items_in_batch
        # engines average gradients over processes: undo it, the tokens were counted over all of them
        loss = (
            outputs.loss
            / tokens
            * (self.accelerator.num_processes if num_items_in_batch is not None else 1)
        )
        if not torch.isfinite(loss):
            raise FloatingPointError(self._non_finite(f"the loss is {loss.item()}", ids))
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The stock one; a norm that is not finite ends the run before it reaches the weights, an unusual one is said."""
        norm = super()._get_grad_norm(model, grad_norm)
        if (
            norm is not None and not self.args.fp16
        ):  # there, too large a loss scale shows like this, and is mended
            if not math.isfinite(norm):
                raise FloatingPointError(
                    self._non_finite(f"the gradient's norm is {float(norm)}", self._ids)
                )
            if warning := self.alarm.check(float(norm)):
                self.accelerator.print(
                    f"step {self.state.global_step + 1}: {warning}; samples {_listed(self._ids)}"
                )
        return norm

    def _non_finite(self, what: str, ids: Sequence[str]) -> str:
        last = transformers.trainer_utils.get_last_checkpoint(self.args.output_dir or "")
        return (
            f"{what} at step {self.state.global_step + 1}, samples {_listed(ids)}; last good checkpoint: "
            f"{last or 'none yet'}. Try a lower learning rate, or --bf16 instead of --fp16."
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Validation loss: the mean over all tokens of the set, not over batches. No logits are kept."""
        model = self._wrap_model(cast(nn.Module, self.model), training=False)
        model.eval()
        total = torch.zeros(2, device=self.args.device, dtype=torch.float64)
        for batch in dataloader:
            self._read_notes(batch)
            batch.pop("metadata")
            inputs = self._prepare_inputs(self.drop_padding_samples(batch))
            with torch.no_grad(), self.compute_loss_context_manager():
                total += torch.stack(
                    [model(**inputs).loss.double(), total.new_tensor(len(inputs["labels"]))]
                )
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        nll, tokens = self.accelerator.reduce(total, "sum").tolist()
        metrics = {
            f"{metric_key_prefix}_loss": nll / tokens,
            f"{metric_key_prefix}_perplexity": math.exp(min(nll / tokens, 700)),
        }
        if self.captions:
            metrics[f"{metric_key_prefix}_cider"] = self._caption(self.captions)
        return EvalLoopOutput(None, None, metrics, self.num_examples(dataloader))  # type: ignore[arg-type]

    def drop_padding_samples(self, batch: dict[str, Any]) -> dict[str, Any]:
        """All processes get as many batches: the last are filled up with rows from the first, which count no second time."""
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:
            rows, length = batch["input_ids"].shape
            new = (
                batch["logit_positions"] // length
                < state.remainder - self.accelerator.process_index * rows
            )
            batch = {
                **batch,
                "logit_positions": batch["logit_positions"][new],
                "labels": batch["labels"][new],
            }
        return batch

    def _watched_pictures(self) -> EvalCaptions | None:
        args = self.args
        if args.eval_strategy == "no" or not args.eval_captions or self.eval_dataset is None:
            return None
        zero = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if self.is_fsdp_enabled or (zero is not None and zero.zero_stage == 3):
            self.accelerator.print(
                "--eval_captions: none, no process has all the weights that captioning takes"
            )
            return None
        found = EvalCaptions(
            cast(Any, self.eval_dataset), args.eval_captions, Path(str(args.output_dir))
        )
        return found if found.rows else None

    def _caption(self, captions: EvalCaptions) -> float:
        """The first process writes captions, the others wait; all get to know how good they are."""
        score = torch.zeros((), device=self.args.device)
        if self.is_world_process_zero():
            model: Llava = self.accelerator.unwrap_model(self.model)
            shown = 0 if self.args.disable_tqdm else 3
            score += captions.write(
                model, self.state.global_step, self.callback_handler.callbacks, shown
            )
        return self.accelerator.reduce(score, "sum").item()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Besides the stock orders: batches of one length, whatever the dataset's items are."""
        dataset = train_dataset or self.train_dataset
        return self._by_length(dataset, self.args.train_batch_size) or super()._get_train_sampler(
            dataset
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return self._by_length(
            eval_dataset, self.args.eval_batch_size
        ) or super()._get_eval_sampler(eval_dataset)

    def _by_length(self, dataset: Any, batch_size: int) -> LengthGroupedSampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return None
        lengths = dataset.lengths(self.accelerator.unwrap_model(self.model).vision_tower.num_tokens)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # ranks wait for the longest batch: theirs are of one length too
        return LengthGroupedSampler(lengths, batch_size * self.args.world_size, seed)

    # ---- what people should know ----

    def _read_notes(self, batch: dict[str, Any]) -> None:
        """Say what the examples of a batch want said; stop when too many images are bad."""
        warnings: list[str] = batch["metadata"]["warnings"]
        placeholders = int((batch["input_ids"] == IMAGE_INDEX).sum())
        self.seen["images"] += placeholders // cast(Any, self.data_collator).tokens_per_image
        for note in warnings:
            kind = note.partition(",")[0]
            self.seen[kind] += 1
            if self.seen[kind] <= 10:
                self.accelerator.print(
                    f"{note}" + (" (later ones are only counted)" if self.seen[kind] == 10 else "")
                )
        bad = self.seen["bad image"]
        # a handful among the first hundred says nothing yet
        if bad > self.max_bad_images * max(self.seen["images"], 100):
            raise ValueError(
                f"{bad} bad images among the first {self.seen['images'] + bad}, more than --max_bad_images "
                f"{self.max_bad_images:g}; the last: {warnings[-1] if warnings else ''}. `llava clean` sets them aside."
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Besides the usual: the speed, and one JSON line in `trainer_log.jsonl`."""
        if "loss" in logs:
            logs |= self.meter.read()
        super().log(logs, *args, **kwargs)
        if self.is_world_process_zero():
            line = {"step": self.state.global_step, **self.state.log_history[-1]}
            with (Path(self.args.output_dir or "") / "trainer_log.jsonl").open(
                "a", encoding="utf-8"
            ) as stream:
                stream.write(json.dumps(line) + "\n")

    # ---- optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW on three learning rates: the projector's, the vision tower's and the language model's."""
        if self.optimizer is None:
            trained = [
                (n, p)
                for n, p in (model or cast(nn.Module, self.model)).named_parameters()
                if p.requires_grad
            ]
            decayed = set(self.get_decay_parameter_names(cast(nn.Module, self.model)))
            rates = {"projector": self.args.mm_projector_lr, "vision_tower": self.args.vision_lr}
            groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
            for name, parameter in trained:
                rate = rates.get(name.partition(".")[0])
                key = (self.args.learning_rate if rate is None else rate, name in decayed)
                groups.setdefault(key, []).append(parameter)
            # the log tells the first one's rate
            ordered = sorted(
                groups.items(), key=lambda group: group[0][0] != self.args.learning_rate
            )
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)  # type: ignore[arg-type]
            self.optimizer = cls(
                [
                    {
                        "params": parameters,
                        "lr": rate,
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                    }
                    for (rate, decay), parameters in ordered
                ],
                **options,
            )
        return self.optimizer

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Every save, the intermediate ones too, is a checkpoint that loads with one call."""
        model: Llava = self.accelerator.unwrap_model(self.model)
        weights = self._on_main_process(full_state_dict(model, self.parts))
        if self.args.should_save:
            training = {
                "steps": self.state.global_step,
                "epochs": self.state.epoch,
                **self.settings,
            }
            folder = (
                self._staging / "model"
                if self._staging
                else Path(output_dir or str(self.args.output_dir))
            )
            save_checkpoint(model, folder, self.architecture, self.parts, training, weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = self._on_main_process(
            full_optimizer_state_dict(self.accelerator.unwrap_model(self.model), self.optimizer)
        )
        if self.args.should_save:
            save_file(state, Path(output_dir) / "optimizer.safetensors")
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / "scheduler.pt")

    def _on_main_process(
        self, tensors: Iterator[tuple[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """All processes gather, one keeps."""
        return {name: tensor.cpu().clone() for name, tensor in tensors if self.args.should_save}

    def save_final(self) -> None:
        """Into the output folder: what the run ends with or, with `--load_best_model_at_end`, its best checkpoint."""
        best = self.state.best_model_checkpoint
        if not self.args.load_best_model_at_end or best is None:
            self.save_model()
        elif self.args.should_save:
            copy_checkpoint(best, str(self.args.output_dir))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """The stock one; what will be wanted at the end is saved now, be it a step of `--save_steps` or not."""
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= best and self.args.load_best_model_at_end
        return best

    def _load_best_model(self) -> None:
        """Nothing is loaded: `save_final` copies the checkpoint, which works whatever engine holds the weights."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """`checkpoint-N` with `trainer_state/` in it, under a temporary name until all of it is written.

        The stock method writes into the folder that `_get_output_dir` names, and calls `save_model`: what it writes itself
        (optimizer, schedule, random states) becomes .saving/checkpoint-N, our checkpoint .saving/model. Then the first is
        put into the second, and that takes its place beside the run's others.
        """
        output_dir = Path(str(self.args.output_dir))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = staging = output_dir / ".saving"
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
            best = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best.name == name or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(staging / name / "trainer_state.json"))
            (staging / name).rename(staging / "model" / "trainer_state")
            shutil.rmtree(output_dir / name, ignore_errors=True)
            (staging / "model").rename(output_dir / name)
            staging.rmdir()
            rotate_checkpoints(
                output_dir=str(output_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Nothing: a resumed run gets its weights as a new one does, before an engine cuts the model up."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, None
        )  # it knows each engine's own files
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            state = load_file(folder / "optimizer.safetensors")
            load_optimizer_state_dict(
                self.accelerator.unwrap_model(self.model), self.optimizer, state
            )
            self._restore_schedule(torch.load(folder / "scheduler.pt", weights_only=True))
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _restore_schedule(self, state: dict[str, Any]) -> None:
        """Where it was; on the learning rates of this command line, if they have changed."""
        schedule: Any = self.lr_scheduler
        if isinstance(schedule, LambdaLR):
            factors = [factor(state["last_epoch"]) for factor in schedule.lr_lambdas]
            rates = [base * factor for base, factor in zip(schedule.base_lrs, factors)]
            state = {**state, "base_lrs": schedule.base_lrs, "_last_lr": rates}
        schedule.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, state["_last_lr"]):  # type: ignore[union-attr]
            group["lr"] = rate


def _listed(ids: Sequence[str], most: int = 16) -> str:
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")
