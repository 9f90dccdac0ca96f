"""Train with rewards for sampled captions: `--objective scst`, `rloo` or `grpo`.

One step does the following for each of its images. All captions of a step are sampled from the same weights.

    1. encode the image, prefill its prompt, and sample `--num_samples` captions   (`rollouts`)
    2. compute the reward of each caption                                          (`rewards`)
    3. compare the rewards of an image's captions, which gives their advantages    (`objectives`)
    4. one forward and backward pass, in which the captions are branches of one prompt

With `--sft_weight`, the responses of the record are additional branches, each with a positive weight.
The loss is averaged over the captions of the step. Everything else is inherited from `LlavaTrainer`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from llava_simplified.data.collate import Batch
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.training.log_sums import LogSums
from llava_simplified.training.objectives import (
    clipped_policy_loss,
    grpo_advantages,
    rloo_advantages,
    scst_advantages,
    token_kl,
)
from llava_simplified.training.reference_weights import ReferenceWeights
from llava_simplified.training.rewards import Reward
from llava_simplified.training.rollouts import (
    Answers,
    PromptBatch,
    PromptExample,
    TrainedAnswer,
    collate_answers,
    encode_prompt_images,
    merge_equal_answers,
    sample_answers,
)
from llava_simplified.training.trainer import LlavaTrainer, ModelInputs

logger = logging.getLogger(__name__)

# Above these values a warning is logged. If more than half of the samples reach the limit, the model often fails to
# generate its end token. A model that still writes like the reference has a KL of a few hundredths.
MAX_SHARE_AT_LIMIT = 0.5
MAX_KL = 0.5

# Sums since the last log entry, from which `_read_statistics` computes means.
SUMS = (
    "images",
    "captions",
    "reward",
    "reward_std",
    "caption_tokens",
    "share_at_limit",
    "share_distinct",
    "sampled_tokens",
    "entropy",
    "kl",
    "questions",
    "questions_unanswered",
)


class PolicyTrainer(LlavaTrainer):
    """Train a `Llava` with policy gradients.

    Args:
        reward: The reward of captions.
        reference: The weights at the start of the run, for KL; None if `--kl_coef` is 0.
        share_prefix: Train the captions of an image as branches of one sequence.
        **options: See `LlavaTrainer`. The training set is a `PromptDataset`.

    Attributes:
        sampling_seconds: Duration of sampling and rewards in the last step.

    Raises:
        ValueError: The engine shards the weights.
    """

    def __init__(
        self,
        reward: Reward,
        reference: ReferenceWeights | None,
        share_prefix: bool,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        refuse_sharded_weights(self)
        disable_dropout(self.unwrapped_model)
        self._reward = reward
        self._reference = reference
        self._share_prefix = share_prefix
        self._sums = LogSums(SUMS)
        self._warned: set[str] = set()
        self.sampling_seconds = 0.0

    # ---- sampling ----

    def prepare_micro_batches(self, batches: list[Batch]) -> list[Batch]:
        """Sample captions for the prompts of a step, and return them as batches to train on."""
        start = time.perf_counter()
        sampled = [self._sample_batch(cast(Any, batch)) for batch in batches]
        self.sampling_seconds = time.perf_counter() - start
        return sampled

    def _sample_batch(self, batch: PromptBatch) -> Batch:
        """Sample captions for a micro-batch of prompts, and compute their rewards and advantages."""
        examples = batch["examples"]
        model, args = self.unwrapped_model, self.args
        features = encode_prompt_images(model, examples)
        options = GenerationOptions(
            max_new_tokens=args.sample_max_tokens,
            temperature=args.sample_temperature,
            num_return_sequences=args.num_samples,
            seed=args.seed,
        )
        answers = sample_answers(model, examples, features, options, self.state.global_step)
        rewards = self._rewards_of(examples, answers)
        if args.objective == "scst":
            # The baseline of SCST is the reward of the greedy caption.
            greedy_options = GenerationOptions(
                max_new_tokens=args.sample_max_tokens, seed=args.seed
            )
            # The step only changes random numbers, which greedy decoding does not use.
            greedy = sample_answers(model, examples, features, greedy_options, step=0)
            advantages = scst_advantages(rewards, self._rewards_of(examples, greedy)[:, 0])
        elif args.objective == "rloo":
            advantages = rloo_advantages(rewards)
        else:
            advantages = grpo_advantages(rewards)
        self._count(answers, rewards)
        for name, number in self._reward.pop_counts().items():
            self._sums.add(name, number)
        return self._training_batch(examples, answers, advantages, features)

    def _rewards_of(self, examples: Sequence[PromptExample], answers: Answers) -> torch.Tensor:
        """Return the rewards, float32 (images, samples)."""
        samples = len(answers[0])
        repeated: list[PromptExample] = []
        captions: list[str] = []
        decode = self.unwrapped_model.prompt.decode
        for example, group in zip(examples, answers):
            repeated += [example] * samples
            captions += [decode(answer).strip() for answer in group]
        rewards = torch.tensor(self._reward(repeated, captions))
        rewards = rewards.view(len(examples), samples)
        # A caption without an end token gets the worst reward of its image, however good its beginning is.
        # Otherwise rewards that count matching words would teach the model never to stop.
        cut_off = torch.tensor(
            [[self._is_cut_off(answer) for answer in group] for group in answers]
        )
        # A positive worst reward is lowered to 0, in case all captions of an image are cut off.
        worst = rewards.min(1, keepdim=True).values.clamp_max(0)
        return torch.where(cut_off, worst, rewards)

    def _is_cut_off(self, answer: Sequence[int]) -> bool:
        """Return whether an answer has reached the token limit without an end token."""
        return answer[-1] not in self.unwrapped_model.prompt.stop_ids

    def _training_batch(
        self,
        examples: Sequence[PromptExample],
        answers: Answers,
        advantages: torch.Tensor,
        image_features: Sequence[torch.Tensor | None],
    ) -> Batch:
        """Return the captions as a batch, with the weight of each token."""
        trained: list[list[TrainedAnswer]] = []
        for example, features, group, values in zip(
            examples, image_features, answers, advantages.tolist()
        ):
            if features is not None and self.unwrapped_model.vision_tower.frozen:
                # Do not run the tower again. Copy the features, because they were computed in inference
                # mode, and tensors of inference mode cannot be saved for the backward pass.
                example.pixel_values = None
                example.image_features = features.clone()
            trained_answers: list[TrainedAnswer] = []
            for answer, advantage in zip(group, values):
                # GRPO averages over the tokens of a caption.
                scale = 1 / len(answer) if self.args.objective == "grpo" else 1.0
                weight = scale * advantage
                trained_answers.append(TrainedAnswer(tuple(answer), scale, weight, num_samples=1))
            references = example.reference_answers if self.args.sft_weight else []
            for answer in references:
                # Average over the tokens of a reference and over the references of an image. Multiply by the
                # number of captions, because the loss of a step is divided by it.
                weight = self.args.sft_weight * len(group) / (len(references) * len(answer))
                trained_answers.append(TrainedAnswer(tuple(answer), 0.0, weight, num_samples=0))
            trained.append(merge_equal_answers(trained_answers))
        collator = cast(Any, self.data_collator)
        batch = collate_answers(collator, examples, trained, self._share_prefix)
        batch["num_captions"] = sum(map(len, answers))
        return cast(Batch, batch)

    # ---- loss ----

    def count_items(self, batch: Any) -> int:
        """Return the number of captions of a batch."""
        count: int = batch["num_captions"]
        return count

    def summed_loss(self, model: nn.Module, inputs: ModelInputs) -> tuple[torch.Tensor, Any]:
        """Return the loss of the sampled captions, summed over the captions."""
        inputs = dict(inputs)
        del inputs["num_captions"]
        scales = inputs.pop("token_scales")
        # For each token, the number of equal samples that contain it; 0 for the tokens of references.
        counts = inputs.pop("token_counts")
        reference_log_probs = None
        if self._reference is not None:
            with self._reference.in_place_of_current(self.unwrapped_model):
                reference_log_probs = self.unwrapped_model(**inputs).log_probs
        outputs = model(**inputs)
        loss = outputs.loss
        if self.args.objective == "grpo":
            # Each set of samples is used for one update, so the current model is the one that sampled
            # them. The ratio of PPO's loss is therefore 1, but its gradient is not 0.
            sampled = outputs.log_probs.detach()
            loss = clipped_policy_loss(outputs.log_probs, sampled, inputs["token_weights"])
        self._sums.add("sampled_tokens", counts.sum())
        # At temperature 1, the mean surprise of the samples is an unbiased estimate of the entropy.
        self._sums.add("entropy", -(counts * outputs.log_probs.detach()).sum())
        if reference_log_probs is not None:
            kl = token_kl(outputs.log_probs, reference_log_probs)
            loss = loss + kl_coefficient(self.args) * (scales * kl).sum()
            self._sums.add("kl", (counts * kl.detach()).sum())
        return loss, outputs

    # ---- logs ----

    def _count(self, answers: Answers, rewards: torch.Tensor) -> None:
        """Add the statistics of one micro-batch."""
        self._sums.add("images", len(answers))
        self._sums.add("captions", rewards.numel())
        self._sums.add("reward", rewards.sum())
        self._sums.add("reward_std", rewards.std(1, correction=0).sum())
        for group in answers:
            distinct = {tuple(answer) for answer in group}
            self._sums.add("share_distinct", len(distinct) / len(group))
            for answer in group:
                self._sums.add("caption_tokens", len(answer))
                self._sums.add("share_at_limit", float(self._is_cut_off(answer)))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the rewards too, and warn if the model collapses."""
        if "loss" in logs and self._sums:
            statistics = self._read_statistics()
            logs |= statistics
            if self.is_world_process_zero():
                self._warn(statistics)
        super().log(logs, *args, **kwargs)

    def _read_statistics(self) -> dict[str, float]:
        """Return the means since the last log entry, over all processes."""
        totals = self._sums.read(self.accelerator)
        statistics = {}
        for name in ("reward", "caption_tokens", "share_at_limit"):
            statistics[name] = totals[name] / totals["captions"]
        for name in ("reward_std", "share_distinct"):
            statistics[name] = totals[name] / totals["images"]
        statistics["entropy"] = totals["entropy"] / totals["sampled_tokens"]
        if self._reference is not None:
            statistics["kl"] = totals["kl"] / totals["sampled_tokens"]
        if totals["questions"]:
            statistics["qa_unanswered"] = totals["questions_unanswered"] / totals["questions"]
        return statistics

    def _warn(self, statistics: dict[str, float]) -> None:
        """Log each kind of warning once."""
        at_limit = statistics["share_at_limit"]
        kl = statistics.get("kl", 0.0)
        if statistics["reward_std"] == 0:
            self._warn_once(
                "reward_std is 0: all captions of every image got the same reward, so nothing is learned. Raise "
                "--sample_temperature, or choose a --reward that distinguishes them"
            )
        if at_limit > MAX_SHARE_AT_LIMIT:
            self._warn_once(
                f"share_at_limit is above {MAX_SHARE_AT_LIMIT}: most captions reach --sample_max_tokens without an end "
                "token. Start from a checkpoint that ends its captions, raise --sample_max_tokens, or lower --learning_rate"
            )
        if kl > MAX_KL:
            self._warn_once(
                f"kl is above {MAX_KL} per token: the model may be exploiting the reward. Read some captions; lower "
                "--learning_rate, or raise --kl_coef"
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("step %d: %s.", self.state.global_step, message)


def kl_coefficient(args: Any) -> float:
    """Return `--kl_coef`, or its default: 0.04 as in the paper of GRPO, else 0."""
    if args.kl_coef is not None:
        return float(args.kl_coef)
    return 0.04 if args.objective == "grpo" else 0.0


def refuse_sharded_weights(trainer: LlavaTrainer) -> None:
    """Raise ValueError if the engine shards the weights, so that no process has all of them."""
    if trainer.weights_are_sharded:
        raise ValueError(
            f"--objective {trainer.args.objective} does not support ZeRO-3 and FSDP, because sampling and the reference "
            "need all weights in each process. Use ZeRO-2 or torchrun without sharding."
        )


def disable_dropout(model: nn.Module) -> None:
    """Turn dropout off permanently, so that a caption has the same probability in training as in sampling.

    Besides `nn.Dropout`, models of Transformers have dropout probabilities as attributes, which they pass to functions:
    `attention_dropout` in most, `dropout`, `activation_dropout` and `layerdrop` in OPT, for example.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
