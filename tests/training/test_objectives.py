"""Advantages and losses: their formulas, exact zeros, and a problem whose optimum is known."""

from __future__ import annotations

import pytest
import torch

from llava_simplified.training.objectives import (
    clipped_policy_loss,
    dpo_losses,
    grpo_advantages,
    rloo_advantages,
    scst_advantages,
    sums_by_length,
    token_kl,
)

REWARDS = torch.tensor([[0.5, 1.0, 0.0, 0.25], [3.0, 3.0, 3.0, 7.0]], dtype=torch.float64)


def test_scst_compares_with_the_greedy_caption() -> None:
    greedy = torch.tensor([0.5, 4.0], dtype=torch.float64)
    expected = [[0.0, 0.5, -0.5, -0.25], [-1.0, -1.0, -1.0, 3.0]]
    assert scst_advantages(REWARDS, greedy).tolist() == expected


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    found = rloo_advantages(REWARDS)
    for image, rewards in enumerate(REWARDS.tolist()):
        for number, reward in enumerate(rewards):
            others = rewards[:number] + rewards[number + 1 :]
            assert found[image, number].item() == pytest.approx(reward - sum(others) / 3)


def test_grpo_divides_by_the_standard_deviation() -> None:
    found = grpo_advantages(REWARDS)
    torch.testing.assert_close(found.mean(1), torch.zeros(2).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.std(1), torch.ones(2).double(), atol=1e-3, rtol=0)
    # The scale of the rewards does not matter.
    torch.testing.assert_close(found, grpo_advantages(10 * REWARDS - 3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 123.456])
@pytest.mark.parametrize("samples", [2, 3, 5, 7])
def test_constant_reward_gives_advantages_of_exactly_zero(value: float, samples: int) -> None:
    rewards = torch.full((4, samples), value)
    assert not rloo_advantages(rewards).any()
    assert not grpo_advantages(rewards).any()
    assert not scst_advantages(rewards, rewards[:, 0]).any()


def test_clipped_loss_gives_no_gradient_to_tokens_that_have_moved_far_enough() -> None:
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64)
    weights = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    log_probs = ratios.log().requires_grad_()
    clipped_policy_loss(log_probs, torch.zeros(5).double(), weights).backward()
    # A good token that is already likelier, and a bad one that is less likely, have no gradient.
    expected = torch.tensor([0.0, 1.5, -0.5, 0.0, -1.1], dtype=torch.float64)
    torch.testing.assert_close(log_probs.grad, expected)


def test_token_kl_is_unbiased_and_never_negative() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    reference = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    log_p, log_q = logits.log_softmax(0), reference.log_softmax(0)
    estimates = token_kl(log_p, log_q)
    assert (estimates > 0).all()
    exact = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close((log_p.exp() * estimates).sum(), exact)
    assert not token_kl(log_p, log_p).any()


def test_dpo_losses_equal_the_formula() -> None:
    margins = torch.tensor([2.0, -0.5], dtype=torch.float64)
    expected = torch.log(1 + torch.exp(-0.3 * margins))
    torch.testing.assert_close(dpo_losses(margins, 0.3), expected)
    swapped = torch.log(1 + torch.exp(0.3 * margins))
    found = dpo_losses(margins, 0.3, label_smoothing=0.2)
    torch.testing.assert_close(found, 0.8 * expected + 0.2 * swapped)


def test_sums_by_length_adds_consecutive_runs() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert sums_by_length(values, torch.tensor([1, 3])).tolist() == [1.0, 14.0]


@pytest.mark.parametrize("objective", ["scst", "rloo", "grpo"])
def test_bandit_of_two_captions_learns_the_better_one(objective: str) -> None:
    """The model is two numbers: the logits of two captions, the worse of which is likelier at first."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([2.0, 0.0], dtype=torch.float64, requires_grad=True)
    reward_of = torch.tensor([0.2, 0.8], dtype=torch.float64)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for _ in range(300):
        log_probs = logits.log_softmax(0)
        drawn = torch.multinomial(log_probs.exp(), 5, replacement=True, generator=generator)
        rewards = reward_of[drawn][None]
        if objective == "scst":
            advantages = scst_advantages(rewards, reward_of[log_probs.argmax()][None])
        elif objective == "rloo":
            advantages = rloo_advantages(rewards)
        else:
            advantages = grpo_advantages(rewards)
        sample_log_probs = log_probs[drawn]
        loss = clipped_policy_loss(sample_log_probs, sample_log_probs.detach(), advantages[0] / 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.softmax(0)[1] > 0.95
