"""Train on preference pairs: `--objective dpo` (Rafailov et al., "Direct Preference Optimization", 2023).

One step, for each pair of a chosen and a rejected answer:

    1. compute the log-probabilities that the reference gives to both answers (no gradient)
    2. compute those that the trained model gives to them; the answers are branches of one prompt
    3. a logistic loss on how much more the model prefers the chosen answer than the reference does

The reference is the model at the start of the run. The loss is averaged over the pairs of the step.
Everything else is inherited from `LlavaTrainer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llava_simplified.model.generation import encode_images
from llava_simplified.training.log_sums import LogSums
from llava_simplified.training.objectives import dpo_losses, sums_by_length
from llava_simplified.training.policy_trainer import disable_dropout, refuse_sharded_weights
from llava_simplified.training.reference_weights import ReferenceWeights
from llava_simplified.training.trainer import LlavaTrainer, ModelInputs

# Means over the pairs since the last log entry.
LOGGED = ("reward_chosen", "reward_rejected", "margin", "accuracy")


class PreferenceTrainer(LlavaTrainer):
    """Train a `Llava` with direct preference optimization.

    Args:
        reference: The weights at the start of the run.
        **options: See `LlavaTrainer`. The training set is a `PairDataset`, and the collator a
            `PairCollator`.

    Raises:
        ValueError: The engine shards the weights.
    """

    def __init__(self, reference: ReferenceWeights, **options: Any) -> None:
        super().__init__(**options)
        refuse_sharded_weights(self)
        disable_dropout(self.unwrapped_model)
        self._reference = reference
        self._sums = LogSums(("pairs", *LOGGED))

    def count_items(self, batch: Any) -> int:
        """Return the number of pairs of a batch."""
        return len(batch["answer_lengths"]) // 2

    def summed_loss(self, model: nn.Module, inputs: ModelInputs) -> tuple[torch.Tensor, Any]:
        """Return the loss of a micro-batch, summed over its pairs."""
        inputs = dict(inputs)
        lengths = inputs.pop("answer_lengths")
        current = self.unwrapped_model
        if current.vision_tower.frozen and "pixel_values" in inputs:
            # Run the tower once for both models. Copy the features, because they are computed in inference
            # mode, and tensors of inference mode cannot be saved for the backward pass.
            features = encode_images(current, inputs.pop("pixel_values"))
            inputs["image_features"] = features.clone()
        with self._reference.in_place_of_current(current):
            reference_log_probs = current(**inputs).log_probs
        outputs = model(**inputs)

        # (pairs, 2): how much the log-probability of each answer has risen, in nats; the chosen one first.
        gains = sums_by_length(outputs.log_probs - reference_log_probs, lengths).view(-1, 2)
        # The loss depends on the difference only. So it also falls when the chosen answer becomes less likely, as long
        # as the rejected one loses even more.
        margins = gains[:, 0] - gains[:, 1]
        beta = self.args.dpo_beta
        loss = dpo_losses(margins, beta, self.args.dpo_label_smoothing).sum()
        if self.args.sft_weight:
            # Average over the tokens of each answer, so that long answers do not count more than short ones.
            mean_log_probs = sums_by_length(outputs.log_probs, lengths) / lengths
            of_chosen = mean_log_probs.view(-1, 2)[:, 0]
            loss = loss - self.args.sft_weight * of_chosen.sum()
        self._count(beta * gains.detach())
        return loss, outputs

    def _count(self, rewards: torch.Tensor) -> None:
        """Add the implicit rewards (pairs, 2) of a micro-batch."""
        margins = rewards[:, 0] - rewards[:, 1]
        self._sums.add("pairs", len(rewards))
        self._sums.add("reward_chosen", rewards[:, 0].sum())
        self._sums.add("reward_rejected", rewards[:, 1].sum())
        self._sums.add("margin", margins.sum())
        self._sums.add("accuracy", (margins > 0).sum())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the implicit rewards too."""
        if "loss" in logs and self._sums:
            totals = self._sums.read(self.accelerator)
            for name in LOGGED:
                logs[name] = totals[name] / totals["pairs"]
        super().log(logs, *args, **kwargs)
