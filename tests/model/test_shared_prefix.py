"""Packed rows and shared prompts equal separate sequences: loss and every gradient, in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import LANGUAGE_MODELS, collate, make_images
from peft import LoraConfig, get_peft_model
from sampling import num_examples
from tiny import build_llava
from torch.nn.attention.flex_attention import flex_attention
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import flex_attention as flex_integration

from llava_simplified.data.collate import Collator, Example
from llava_simplified.model.config import TrainedParts
from llava_simplified.model.language_model import attention_kwargs, shared_prefix_mask
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora, freeze
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX, Message

CAPTIONS = [
    ["a red car", "two dogs run over a green field", "a"],
    ["a man reads a book on a bench in the park under cherry blossoms", "party"],
    ["illustration of a little girl"],
]


def build_float64(folder: Path, text: str, attention: str) -> Llava:
    """Build a model with a LoRA adapter, in float64."""
    model = build_llava(folder, text)
    model.language_model.set_attn_implementation(attention)
    freeze(model, TrainedParts())
    add_lora(model, rank=2, alpha=4)
    for name, parameter in model.language_model.named_parameters():
        if "lora_B" in name:
            # LoRA initializes B with zeros, and then the gradient of A is zero.
            torch.nn.init.normal_(parameter, std=0.2)
    return model.double()


def make_examples(model: Llava) -> tuple[list[Example], list[Example]]:
    """Return six captions of three images twice: as 3 examples with shared prompts, and as 6 separate examples."""
    turns = [
        Message("user", "<image>\nWhat is this?"),
        Message("assistant", "a picture"),
        Message("user", "Of what?"),
    ]
    shared: list[Example] = []
    separate: list[Example] = []
    for pixels, captions in zip(make_images(model, 3).split(1), CAPTIONS):
        prefix, answers = model.prompt.render_branches(turns, captions)
        ids = list(prefix.input_ids)
        labels = list(prefix.labels)
        branches = [0] * len(ids)
        for number, answer in enumerate(answers, start=1):
            ids += answer
            labels += answer
            branches += [number] * len(answer)
        shared.append(Example(ids, labels, pixels, branches=branches if len(answers) > 1 else None))
        for caption in captions:
            tokenized = model.prompt.render(turns, caption)
            separate.append(Example(tokenized.input_ids, tokenized.labels, pixels))
    return shared, separate


def loss_and_gradients(model: Llava, rows: list[Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**collate(model, rows)).loss
    loss.backward()
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    assert len(gradients) > 10
    return {"loss": loss.detach(), **gradients}


def assert_same(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-10
) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=name)


# ---- exactness ----

KERNELS: list[tuple[str, str]] = []
for _text in LANGUAGE_MODELS:
    KERNELS.append((_text, "eager"))
    # Only the eager kernel has Gemma's soft cap.
    if _text != "gemma2":
        KERNELS.append((_text, "sdpa"))
        KERNELS.append((_text, "cpu_matmul"))


@pytest.mark.medium
@pytest.mark.parametrize(("text", "attention"), KERNELS)
def test_shared_and_packed_examples_equal_separate_ones(
    models_folder: Path, text: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_float64(models_folder, text, attention)
    # Replace float32, to which norms and the eager softmax convert explicitly, so that everything is
    # computed in float64.
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    shared, separate = make_examples(model)
    expected = loss_and_gradients(model, separate)

    assert_same(loss_and_gradients(model, shared), expected)
    # Packs of separate examples.
    packed = [separate[:4], separate[4:]]
    assert_same(loss_and_gradients(model, packed), expected)
    # A pack of two shared prompts, and a single one.
    packed_and_shared = [shared[:2], shared[2]]
    assert_same(loss_and_gradients(model, packed_and_shared), expected)


def test_sliding_window_is_shorter_than_the_tested_examples(models_folder: Path) -> None:
    """If the window were longer, the test above would not detect a mask without a window."""
    model = build_llava(models_folder, "mistral")
    _, separate = make_examples(model)
    longest = max(len(example.input_ids) for example in separate)
    assert model.config.sliding_window < longest + model.vision_tower.num_tokens - 1


def test_examples_of_a_pack_and_branches_do_not_affect_each_other(models_folder: Path) -> None:
    model = build_llava(models_folder, "qwen2")
    shared, separate = make_examples(model)

    @torch.no_grad()
    def compute_logits(rows: list[Any]) -> torch.Tensor:
        return model(**collate(model, rows)).logits

    # Change the first example of a pack: only its own logits change.
    changed = copy.deepcopy(separate[0])
    changed.input_ids[1] = 7
    changed.pixel_values = 255 - changed.pixel_values
    before = compute_logits([[separate[0], separate[3]]])
    after = compute_logits([[changed, separate[3]]])
    trained = sum(label != IGNORE_INDEX for label in separate[3].labels)
    assert torch.equal(before[-trained:], after[-trained:])
    assert not torch.equal(before[:3], after[:3])

    # Change the first branch of a shared prompt: the logits of the last branch do not change.
    changed = copy.deepcopy(shared[0])
    first_token = changed.branches.index(1)
    changed.input_ids[first_token] = 7
    before = compute_logits([shared[0]])
    after = compute_logits([changed])
    last_branch = changed.branches.count(3)
    assert torch.equal(before[-last_branch:], after[-last_branch:])
    assert not torch.equal(before, after)


# ---- the mask ----


def test_shared_prefix_mask_separates_segments_and_branches_and_limits_windows() -> None:
    def ids(digits: str) -> torch.Tensor:
        return torch.tensor([[int(digit) for digit in digits]])

    # A prompt of two tokens with two branches, a second example of two tokens, and padding.
    segment_ids = ids("11111220")
    branch_ids = ids("00122000")
    position_ids = ids("01223010")
    mask = shared_prefix_mask(segment_ids, branch_ids, position_ids)[0, 0]
    diagram: list[str] = []
    for row in mask.tolist():
        diagram.append("".join("x" if attends else "." for attends in row))
    assert diagram == [
        "x.......",
        "xx......",
        "xxx.....",
        "xx.x....",
        "xx.xx...",
        ".....x..",
        ".....xx.",
        ".......x",
    ]
    window = shared_prefix_mask(ids("1111"), ids("0012"), ids("0122"), window=2)[0, 0]
    assert window.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]


@st.composite
def any_example(draw: st.DrawFn) -> Example:
    """Draw a prompt with images and sometimes a trained earlier answer, followed by one to four answers."""
    prompt = [5, *draw(st.lists(st.sampled_from([IMAGE_INDEX, 6, 7, 8]), max_size=5))]
    # The token 8 stands for an earlier answer.
    labels = [token if token == 8 else IGNORE_INDEX for token in prompt]
    answer = st.lists(st.integers(10, 99), min_size=1, max_size=4)
    answers = draw(st.lists(answer, min_size=1, max_size=4))
    ids = list(prompt)
    branches = [0] * len(prompt)
    for number, tokens in enumerate(answers, start=1):
        ids += tokens
        labels += tokens
        branches += [number] * len(tokens)
    return Example(ids, labels, branches=branches if len(answers) > 1 else None)


# (ids that are attended to, their positions, the token to predict)
Prediction = tuple[list[int], list[int], int]


def predictions_of_batch(batch: dict[str, Any]) -> list[Prediction]:
    if "attention_mask" in batch:
        # No packs and no shared prompts: causal attention within each row.
        segment_ids = batch["attention_mask"]
        branch_ids = torch.zeros_like(segment_ids)
        position_ids = torch.arange(segment_ids.shape[1]).expand_as(segment_ids)
    else:
        segment_ids = batch["segment_ids"]
        branch_ids = batch["branch_ids"]
        position_ids = batch["position_ids"]
    mask = shared_prefix_mask(segment_ids, branch_ids, position_ids)[:, 0].numpy()
    ids = batch["input_ids"].numpy()
    positions = position_ids.numpy()
    predictions: list[Prediction] = []
    for index, target in zip(batch["logit_positions"].tolist(), batch["labels"].tolist()):
        row, column = divmod(index, segment_ids.shape[1])
        attended = mask[row, column]
        attended_ids = ids[row, attended].tolist()
        attended_positions = positions[row, attended].tolist()
        predictions.append((attended_ids, attended_positions, target))
    return predictions


def predictions_of_example(example: Example, tokens_per_image: int) -> list[Prediction]:
    """Return the predictions of an example by a plain loop that treats each answer as a separate sequence."""
    branches = example.branches or [0] * len(example.input_ids)
    # Without branches, all tokens have the number 0.
    numbers = [0]
    if example.branches:
        numbers = list(range(1, max(branches) + 1))
    predictions: list[Prediction] = []
    for number in numbers:
        text: list[int] = []
        for token, label, branch in zip(example.input_ids, example.labels, branches):
            if branch not in (0, number):
                continue
            if label != IGNORE_INDEX:
                positions = list(range(len(text)))
                predictions.append((text.copy(), positions, label))
            repeats = tokens_per_image if token == IMAGE_INDEX else 1
            text += [token] * repeats
    return predictions


@pytest.mark.medium
@given(
    st.lists(st.lists(any_example(), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(1, 3),
)
@settings(max_examples=num_examples(100), deadline=None)
def test_batch_predicts_every_token_from_the_same_context_as_a_separate_sequence(
    rows: list[list[Example]], tokens_per_image: int
) -> None:
    batch = Collator(tokens_per_image, 0)(rows)
    expected: list[Prediction] = []
    for row in rows:
        for example in row:
            expected += predictions_of_example(example, tokens_per_image)
    assert sorted(predictions_of_batch(batch)) == sorted(expected)


# ---- unsupported models and kernels ----


@pytest.mark.parametrize(
    "config",
    [
        transformers.MptConfig(vocab_size=9, d_model=32, n_layers=1, n_heads=4),
        transformers.FalconConfig(
            vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True
        ),
        transformers.GPTNeoConfig(
            vocab_size=9,
            hidden_size=32,
            num_layers=1,
            num_heads=4,
            attention_types=[[["local"], 1]],
        ),
        transformers.RwkvConfig(vocab_size=9, hidden_size=32, num_hidden_layers=2),
    ],
    ids=lambda config: config.model_type,
)
def test_attention_kwargs_refuse_a_model_without_position_ids(
    config: transformers.PreTrainedConfig,
) -> None:
    """Without this check, the loss of such a model would silently be wrong (by 0.3 % for MPT)."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    ids = torch.zeros(1, 3, dtype=torch.long)
    for language_model in (model, adapted):
        with pytest.raises(ValueError, match=rf"{config.model_type} .*position_ids.*--packing"):
            attention_kwargs(language_model, ids, ids, ids, torch.float32)


def test_flash_attention_refuses_a_shared_prompt(models_folder: Path) -> None:
    model = build_llava(models_folder, "llama")
    shared, _ = make_examples(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 .*--share_prefix False"):
        model(**collate(model, [shared[0]]))


# ---- kernels that need a GPU ----


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    causal: bool,
    softmax_scale: float,
    sliding_window: int | None,
    **_: Any,
) -> torch.Tensor:
    """Compute the output of a variable-length flash kernel, in a loop over the sequences.

    Args:
        q: (positions, heads, head_dim); k and v have fewer heads.
        cu_seqlens_q: int32 (sequences + 1,), the start of each sequence, and the end of the last.
    """
    assert causal
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.dtype == torch.int32
    outputs: list[torch.Tensor] = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()):
        # Repeat the key and value heads (grouped-query attention).
        repeats = q.shape[1] // k.shape[1]
        keys = k[start:end].repeat_interleave(repeats, dim=1)
        values = v[start:end].repeat_interleave(repeats, dim=1)
        scores = torch.einsum("qhw,khw->hqk", q[start:end], keys) * softmax_scale
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (distance < 0) | (distance >= (sliding_window or 10**9))
        scores[:, hidden] = -torch.inf
        outputs.append(torch.einsum("hqk,khw->qhw", scores.softmax(-1), values))
    return torch.cat(outputs)


@pytest.mark.parametrize("text", ["mistral", "llama"])
def test_flash_attention_gets_the_boundaries_of_the_sequences(
    models_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel requires CUDA, so a loop replaces it. This tests the code of Transformers that calls the kernel."""

    def other_kernel(*_: object, **__: object) -> None:
        raise AssertionError("without boundaries, sequences would attend to each other")

    def process_kwargs(**kwargs: Any) -> dict[str, Any]:
        return {
            "softmax_scale": kwargs["softmax_scale"],
            "sliding_window": kwargs["sliding_window"],
            "causal": kwargs["is_causal"],
        }

    kernels = (other_kernel, varlen_attention, other_kernel, other_kernel, other_kernel)
    monkeypatch.setattr(
        flash, "lazy_import_flash_attention", lambda _: (kernels, (process_kwargs, None))
    )
    model = build_float64(models_folder, text, "sdpa")
    _, separate = make_examples(model)
    rows = [separate[:4], separate[4:]]  # Of different lengths: the second is padded.
    expected = loss_and_gradients(model, rows)
    model.config._attn_implementation = "flash_attention_2"
    assert_same(loss_and_gradients(model, rows), expected, tolerance=1e-5)


@pytest.mark.medium
@pytest.mark.parametrize("text", ["mistral", "llama", "gemma2"])
def test_flex_attention_equals_eager_attention(
    models_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, only the uncompiled forward pass can be tested. Gemma 2 has layers with and without a window."""
    monkeypatch.setattr(flex_integration.WrappedFlexAttention, "__call__", lambda _: flex_attention)
    model = build_llava(models_folder, text)
    model.language_model.set_attn_implementation("eager")
    shared, separate = make_examples(model)
    batch = collate(model, [[shared[0], shared[1]], [separate[0], shared[2]]])
    with torch.no_grad():
        expected = model(**batch).logits
        model.config._attn_implementation = "flex_attention"
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
