"""Objectives beyond cross entropy, as pure functions: policy gradients and preference pairs.

A policy gradient samples captions from the model, scores each, and makes the better ones more likely:

    loss = - sum over captions i and their tokens t of  A_i * log p(token t of i | image, tokens before)

The *advantage* A_i says how much better than expected caption i is. The methods differ in what they
expect, the baseline:

    scst   r_i - r of the greedy caption                      (Rennie et al., 2017)
    rloo   r_i - mean of the other samples' rewards           (Kool et al., 2019; Ahmadian et al., 2024)
    grpo   (r_i - mean) / standard deviation of the samples   (Shao et al., 2024)

Rewards and advantages are (images, samples).

Preference pairs need neither samples nor rewards. Direct preference optimization makes the chosen of two
answers more likely than the rejected one, compared with a reference:

    loss = - log sigmoid(beta * margin)                       (Rafailov et al., 2023)
    margin = (gain of the chosen) - (gain of the rejected);  gain = log p(answer) - log p_reference(answer)

Every function returns a tensor of the same data type as its arguments.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

# Added to the standard deviation of GRPO, as in TRL, so that tiny differences of rewards are not amplified.
STANDARD_DEVIATION_EPSILON = 1e-4
# The range of the probability ratio, 1 - 0.2 to 1 + 0.2, as in PPO and GRPO.
CLIP_EPSILON = 0.2


def scst_advantages(rewards: torch.Tensor, greedy_rewards: torch.Tensor) -> torch.Tensor:
    """Return the advantages of self-critical sequence training.

    Args:
        rewards: (images, samples).
        greedy_rewards: (images,), the reward of each image's greedy caption.
    """
    return rewards - greedy_rewards[:, None]


def rloo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Return the advantages of REINFORCE leave-one-out: each sample against the mean of the others.

    Args:
        rewards: (images, samples), at least two samples.
    """
    samples = rewards.shape[1]
    # Use differences to the first sample, which are exactly 0 if all rewards are equal. The mean of five equal
    # numbers may differ from them in the last digit; without this step, that noise would be trained on.
    shifted = rewards - rewards[:, :1]
    mean_of_others = (shifted.sum(1, keepdim=True) - shifted) / (samples - 1)
    return shifted - mean_of_others


def grpo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Return the advantages of group relative policy optimization: rewards relative to their mean, in standard deviations.

    Args:
        rewards: (images, samples), at least two samples.
    """
    shifted = rewards - rewards[:, :1]  # as in `rloo_advantages`
    deviations = shifted - shifted.mean(1, keepdim=True)
    return deviations / (shifted.std(1, keepdim=True) + STANDARD_DEVIATION_EPSILON)


def clipped_policy_loss(
    log_probs: torch.Tensor,
    sampled_log_probs: torch.Tensor,
    weights: torch.Tensor,
    epsilon: float = CLIP_EPSILON,
) -> torch.Tensor:
    """Return PPO's clipped loss, summed over the tokens.

    The ratio of the probabilities now and at sampling corrects for samples of an older model. A token
    whose ratio has left the range in the direction of its weight has no gradient. For samples
    of the same model the ratio is 1, and the gradient is that of plain REINFORCE.

    Args:
        log_probs: (tokens,), of the model that is trained.
        sampled_log_probs: (tokens,), of the model that sampled them.
        weights: (tokens,), the advantage of each token's caption, times any normalization.
        epsilon: Half the width of the range of the ratio.
    """
    ratio = (log_probs - sampled_log_probs).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(weights * ratio, weights * clipped).sum()


def token_kl(log_probs: torch.Tensor, reference_log_probs: torch.Tensor) -> torch.Tensor:
    """Return an estimate of the KL divergence from the reference, for each sampled token.

    It is Schulman's k3, which GRPO uses: never negative, and unbiased for samples of the model.

    Args:
        log_probs: (tokens,), of the model.
        reference_log_probs: (tokens,), of the reference.
    """
    difference = reference_log_probs - log_probs
    return difference.expm1() - difference


def dpo_losses(
    margins: torch.Tensor, beta: float = 0.1, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return the loss of direct preference optimization for each pair.

    Args:
        margins: (pairs,), how much more the model prefers the chosen answer than the reference does:
            log p(chosen) - log p(rejected) of the model, minus the same difference of the reference. The
            log-probability of an answer is the sum over its tokens.
        beta: How strongly the loss keeps the model close to the reference.
        label_smoothing: Assumed share of pairs whose answers are swapped (conservative DPO, Mitchell,
            2023).
    """
    as_labeled = logsigmoid(beta * margins)
    swapped = logsigmoid(-beta * margins)
    return -(1 - label_smoothing) * as_labeled - label_smoothing * swapped


def sums_by_length(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Add up the values of the tokens of each answer.

    Args:
        values: (tokens,), the tokens of all answers, one answer after the other.
        lengths: int64 (answers,), the number of tokens of each; they add up to `tokens`.

    Returns:
        (answers,)
    """
    # Pass `output_size`, the number of all tokens. Otherwise, the host would wait for the GPU to compute it.
    index = torch.arange(len(lengths), device=values.device)
    answer_of_token = index.repeat_interleave(lengths, output_size=len(values))
    return values.new_zeros(len(lengths)).index_add(0, answer_of_token, values)
