"""REINFORCE, clipped ratios and DPO over shared prompts equal plain formulas over separate sequences, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_helpers import LANGUAGE_MODELS, collate, make_images
from tiny import build_llava
from torch.nn.functional import log_softmax

from llava_simplified.data.collate import Collator, Example, expand_image_placeholders
from llava_simplified.model.config import TrainedParts
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora, freeze
from llava_simplified.prompt import IMAGE_INDEX, Message
from llava_simplified.training.objectives import (
    clipped_policy_loss,
    dpo_losses,
    rloo_advantages,
    sums_by_length,
    token_kl,
)
from llava_simplified.training.rollouts import (
    TrainedAnswer,
    branch_examples,
    collate_answers,
    merge_equal_answers,
)

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
    """Return the log-probability of each token of one answer, in a separate sequence."""
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

    # The definition: one sequence after the other, with the baseline computed by hand.
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


@pytest.mark.parametrize("text", LANGUAGE_MODELS)
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

    shared, separate = (
        branch_examples(Example(prompt, [], image[None]), answers[0], share_prefix)
        for share_prefix in (True, False)
    )
    weights = advantages.repeat_interleave(lengths)
    for rows in (shared, separate, [separate]):
        log_probs = model(**collate(model, rows)).log_probs
        loss = clipped_policy_loss(log_probs, old, weights)
        loss = loss + 0.04 * token_kl(log_probs, reference).sum()
        torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-10)
        assert_same(gradients_of(model, loss), expected)


def test_equal_captions_trained_once_equal_plain_reinforce(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some samples are equal, one of them is also a reference, and examples of different lengths share rows."""
    model = build_float64(models_folder, "qwen2", monkeypatch)
    prompt, answers = answers_of(model)
    images = make_images(model, 3)
    # A prompt that is shorter than the answers together.
    prompt = [prompt[0], IMAGE_INDEX, prompt[-1]]
    long, short = [*answers[0], *answers[1]], answers[1][0]
    groups = [
        [short] * 4,
        [long[0], long[0], long[1] * 2, long[2], *long[4:]],
        [long[2], short, short, long[2]],
    ]
    weights = [[0.1, 0.2, -0.4, 0.3], [0.5, -1.0, 0.25, 0.75, -0.2, 0.4], [1.0, -0.5, -0.5, 0.1]]
    reference_weight = 0.7

    expected_loss = torch.zeros(())
    for image, group, values in zip(images, groups, weights):
        for answer, weight in [*zip(group, values), (answers[1][0], reference_weight)]:
            log_probs = plain_log_probs(model, prompt, answer, image)
            expected_loss = expected_loss - weight * log_probs.sum()
    expected = gradients_of(model, expected_loss)

    prompts = [Example(prompt, [], image[None], id=str(i)) for i, image in enumerate(images)]
    trained = []
    for group, values in zip(groups, weights):
        of_image = [TrainedAnswer(tuple(a), 1.0, w, 1) for a, w in zip(group, values)]
        of_image.append(TrainedAnswer(tuple(answers[1][0]), 0.0, reference_weight, 0))
        trained.append(merge_equal_answers(of_image))
    assert [len(group) for group in trained] == [1, 6, 2]
    collator = Collator(model.vision_tower.num_tokens, model.prompt.end_id)
    for share_prefix in (True, False):
        batch = collate_answers(collator, prompts, trained, share_prefix)
        # The number of sampled tokens, with all repetitions.
        counts = batch.pop("token_counts")
        assert counts.sum() == sum(len(answer) for group in groups for answer in group)
        assert batch.pop("token_scales").sum() == counts.sum()
        assert sorted(set(batch.pop("metadata")["ids"])) == ["0", "1", "2"]
        # The two short examples share a row.
        assert len(batch["input_ids"]) == (2 if share_prefix else 9)
        batch["token_weights"] = batch["token_weights"].double()
        output = model(**batch)
        torch.testing.assert_close(output.loss, expected_loss, rtol=1e-6, atol=1e-6)
        for name, gradient in gradients_of(model, output.loss).items():
            # The weights are float32.
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_dpo_of_two_branches_equals_the_formula_over_separate_sequences(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_float64(models_folder, "qwen2", monkeypatch)
    prompt, answers = answers_of(model)
    image = make_images(model, 1)[0]
    pair = answers[0][:2]
    with torch.no_grad(), model.language_model.disable_adapter():
        reference = [plain_log_probs(model, prompt, answer, image).sum() for answer in pair]
    chosen, rejected = (plain_log_probs(model, prompt, answer, image).sum() for answer in pair)
    margin = 0.3 * ((chosen - reference[0]) - (rejected - reference[1]))
    # The formula of the paper, without the functions that the package uses.
    expected_loss = -0.9 * torch.log(1 / (1 + torch.exp(-margin)))
    expected_loss = expected_loss - 0.1 * torch.log(1 / (1 + torch.exp(margin)))
    expected = gradients_of(model, expected_loss)

    rows = branch_examples(Example(prompt, [], image[None]), pair, share_prefix=True)
    sums = sums_by_length(
        model(**collate(model, rows)).log_probs, torch.tensor([len(answer) for answer in pair])
    )
    margins = sums[:1] - sums[1:] - (reference[0] - reference[1])
    loss = dpo_losses(margins, beta=0.3, label_smoothing=0.1).sum()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-10)
    assert_same(gradients_of(model, loss), expected)


def test_constant_reward_gives_gradients_of_exactly_zero(models_folder: Path) -> None:
    model = build_llava(models_folder, "llama")
    prompt, answers = answers_of(model)
    rows = branch_examples(Example(prompt, [], make_images(model, 1)), answers[0], True)
    lengths = torch.tensor([len(answer) for answer in answers[0]])
    advantages = rloo_advantages(torch.full((1, 3), 0.1))[0]
    batch = collate(model, rows)
    model(**batch, token_weights=advantages.repeat_interleave(lengths)).loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()
