"""Weighted losses of branches equal plain REINFORCE over separate sequences, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_helpers import LANGUAGE_MODELS, collate, make_images
from tiny import build_llava
from torch.nn.functional import log_softmax

from llava_simplified.data.collate import Example, expand_image_placeholders
from llava_simplified.model.config import TrainedParts
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora, freeze
from llava_simplified.prompt import IMAGE_INDEX, Message
from llava_simplified.training.objectives import (
    clipped_policy_loss,
    rloo_advantages,
    token_kl,
)
from llava_simplified.training.rollouts import branch_examples

CAPTIONS = [["a red car", "two dogs run over a field", "a"], ["party", "a man", "a man reads"]]
REWARDS = torch.tensor([[0.3, 0.9, 0.1], [1.0, 0.2, 0.2]], dtype=torch.float64)
TURNS = [Message("user", "<image>\nWhat is this?")]


def build_float64(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Llava:
    model = build_llava(folder, text)
    model.language_model.set_attn_implementation("eager")
    freeze(model, TrainedParts())
    add_lora(model, rank=2, alpha=4)
    for name, parameter in model.language_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    # Norms and the eager softmax convert to float32 explicitly.
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return model.double()


def gradients_of(model: Llava, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    assert len(gradients) > 10
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3
    return gradients


def answers_of(model: Llava) -> tuple[list[int], list[list[list[int]]]]:
    """Return the prompt, and the token ids of the captions of each image."""
    prompt = model.prompt.render(TURNS, None).input_ids
    answers = [model.prompt.render_branches(TURNS, captions)[1] for captions in CAPTIONS]
    return prompt, answers


def plain_log_probs(model: Llava, prompt: list[int], answer: list[int], image: torch.Tensor):
    """Return the log-probability of each token of one answer, in a sequence of its own."""
    ids = torch.tensor(expand_image_placeholders(prompt, model.vision_tower.num_tokens))
    ids = torch.cat([ids, torch.tensor(answer)])
    embeds = model.language_model.get_input_embeddings()(ids.masked_fill(ids == IMAGE_INDEX, 0))
    embeds = embeds.clone()
    features = model.vision_tower(image[None]).double()
    embeds[ids == IMAGE_INDEX] = model.projector(features)[0]
    logits = model.language_model(inputs_embeds=embeds[None], use_cache=False).logits[0]
    log_probs = log_softmax(logits, -1)
    start = len(ids) - len(answer)
    return torch.stack([log_probs[start - 1 + i, token] for i, token in enumerate(answer)])


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("text", LANGUAGE_MODELS)
def test_shared_update_equals_plain_reinforce(
    models_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_float64(models_folder, text, monkeypatch)
    prompt, answers = answers_of(model)
    images = make_images(model, 2)
    advantages = rloo_advantages(REWARDS)

    # By definition: one sequence after the other, and the baseline computed by hand.
    expected_loss = torch.zeros(())
    log_probs: list[torch.Tensor] = []
    for image, image_answers, rewards in zip(images, answers, REWARDS.tolist()):
        for number, answer in enumerate(image_answers):
            others = rewards[:number] + rewards[number + 1 :]
            advantage = rewards[number] - sum(others) / len(others)
            log_probs.append(plain_log_probs(model, prompt, answer, image))
            expected_loss = expected_loss - advantage * log_probs[-1].sum()
    expected = gradients_of(model, expected_loss)

    examples: list[Example] = []
    separate: list[Example] = []
    for image, image_answers in zip(images, answers):
        template = Example(prompt, [], image[None])
        examples += branch_examples(template, image_answers, share_prefix=True)
        separate += branch_examples(template, image_answers, share_prefix=False)
    lengths = torch.tensor([len(answer) for group in answers for answer in group])
    weights = advantages.flatten().repeat_interleave(lengths)
    for rows in (examples, separate, [examples], [separate[:4], separate[4:]]):
        output = model(**collate(model, rows), token_weights=weights)
        torch.testing.assert_close(output.log_probs, torch.cat(log_probs), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(output.loss, expected_loss, rtol=1e-10, atol=1e-10)
        assert_same(gradients_of(model, output.loss), expected)


@pytest.mark.parametrize("text", ["llama", "gemma2"])
def test_clipped_ratio_and_kl_equal_a_plain_loop(
    models_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_float64(models_folder, text, monkeypatch)
    prompt, answers = answers_of(model)
    image = make_images(model, 1)[0]
    lengths = torch.tensor([len(answer) for answer in answers[0]])
    generator = torch.Generator().manual_seed(1)
    total = int(lengths.sum())
    # Ratios on both sides of both limits.
    old_offset = 0.4 * torch.randn(total, generator=generator, dtype=torch.float64)
    reference_offset = 0.3 * torch.randn(total, generator=generator, dtype=torch.float64)
    advantages = rloo_advantages(REWARDS[:1])[0]

    plain = [plain_log_probs(model, prompt, answer, image) for answer in answers[0]]
    old = torch.cat(plain).detach() + old_offset
    reference = torch.cat(plain).detach() + reference_offset
    expected_loss = torch.zeros(())
    position = clipped_tokens = 0
    for advantage, caption in zip(advantages, plain):
        for log_prob in caption:
            ratio = torch.exp(log_prob - old[position])
            limited = ratio.clamp(0.8, 1.2)
            clipped_tokens += int(ratio != limited)
            expected_loss = expected_loss - torch.min(advantage * ratio, advantage * limited)
            log_ratio = reference[position] - log_prob
            expected_loss = expected_loss + 0.04 * (torch.exp(log_ratio) - log_ratio - 1)
            position += 1
    assert 0 < clipped_tokens < total
    expected = gradients_of(model, expected_loss)

    rows = branch_examples(Example(prompt, [], image[None]), answers[0], share_prefix=True)
    log_probs = model(**collate(model, rows)).log_probs
    weights = advantages.repeat_interleave(lengths)
    loss = clipped_policy_loss(log_probs, old, weights)
    loss = loss + 0.04 * token_kl(log_probs, reference).sum()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-10)
    assert_same(gradients_of(model, loss), expected)


def test_constant_reward_gives_exactly_no_gradient(models_folder: Path) -> None:
    model = build_llava(models_folder, "llama")
    prompt, answers = answers_of(model)
    rows = branch_examples(Example(prompt, [], make_images(model, 1)), answers[0], True)
    lengths = torch.tensor([len(answer) for answer in answers[0]])
    advantages = rloo_advantages(torch.full((1, 3), 0.1))[0]
    batch = collate(model, rows)
    model(**batch, token_weights=advantages.repeat_interleave(lengths)).loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()
