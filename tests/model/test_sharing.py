"""Packed and prefix-shared sequences against the same captions each on its own: loss and every gradient, in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_llava import LANGUAGE_MODELS, build, pictures
from torch.nn.functional import scaled_dot_product_attention

from llava_simplified.data.collate import Collator, Example
from llava_simplified.model import cpu_attention
from llava_simplified.model.config import TrainedParts
from llava_simplified.model.cpu_attention import cpu_matmul_attention
from llava_simplified.model.language_model import attention_kwargs, shared_prefix_mask
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora, freeze
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX, Message

CAPTIONS = [
    ["a red car", "two dogs run over a green field", "a"],
    ["a man reads a book on a bench in the park under cherry blossoms", "party"],
    ["illustration of a little girl"],
]


def double(folder: Path, text: str, attention: str) -> Llava:
    model = build(folder, text)
    model.language_model.set_attn_implementation(attention)
    freeze(model, TrainedParts())
    add_lora(model, rank=2, alpha=4)
    for name, parameter in model.language_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(
                parameter, std=0.2
            )  # at zero, half of the gradients would be zero as well
    return model.double()


def samples(model: Llava) -> tuple[list[Example], list[Example]]:
    """The same captions of three images, sharing their prompts and apart."""
    shared, apart = [], []
    turns = [
        Message("user", "<image>\nWhat is this?"),
        Message("assistant", "a picture"),
        Message("user", "Of what?"),
    ]
    for pixels, captions in zip(pictures(model, 3).split(1), CAPTIONS):
        prefix, answers = model.prompt.render_branches(turns, captions)
        told = [token for answer in answers for token in answer]
        tags = [0] * len(prefix.input_ids) + [n for n, a in enumerate(answers, 1) for _ in a]
        ids, labels = prefix.input_ids + told, prefix.labels + told
        shared.append(Example(ids, labels, pixels, branches=tags if len(answers) > 1 else None))
        for caption in captions:
            one = model.prompt.render(turns, caption)
            apart.append(Example(one.input_ids, one.labels, pixels))
    return shared, apart


def loss_and_gradients(model: Llava, rows: list) -> dict[str, torch.Tensor]:
    batch = Collator(model.vision_tower.num_tokens, 1)(rows)
    batch.pop("metadata")
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) > 10
    return {"loss": loss.detach(), **gradients}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-10, atol=1e-10, msg=name)


KERNELS = [(text, kernel) for text in LANGUAGE_MODELS for kernel in ("sdpa", "eager", "cpu_matmul")]
KERNELS = [
    pair for pair in KERNELS if pair[0] != "gemma2" or pair[1] == "eager"
]  # its soft cap is eager's only


@pytest.mark.parametrize(("text", "attention"), KERNELS)
def test_shared_and_packed_equal_apart(
    models_folder: Path, text: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = double(models_folder, text, attention)
    # the models' norms and eager softmax round to float32 on the way, by these names
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    shared, apart = samples(model)
    wanted = loss_and_gradients(model, apart)
    assert_same(loss_and_gradients(model, shared), wanted)
    assert_same(loss_and_gradients(model, [apart[:4], apart[4:]]), wanted)
    assert_same(loss_and_gradients(model, [shared[:2], shared[2]]), wanted)


@pytest.mark.parametrize(
    "config",
    [
        transformers.MptConfig(vocab_size=9, d_model=32, n_layers=1, n_heads=4),
        transformers.FalconConfig(vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True),
        transformers.GPTNeoConfig(vocab_size=9, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["local"], 1]]),
        transformers.RwkvConfig(vocab_size=9, hidden_size=32, num_hidden_layers=2),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_a_model_that_counts_places_by_itself_is_refused(
    config: transformers.PretrainedConfig,
) -> None:
    """Shared or packed it would run, and be trained on another loss: MPT's is off by 3 in a thousand."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    ids = torch.zeros(1, 3, dtype=torch.long)
    for text in (model, adapted):
        with pytest.raises(
            ValueError, match=f"{config.model_type} can't be told its tokens' places"
        ):
            attention_kwargs(text, ids, ids, ids, torch.float32)


def test_the_sliding_window_is_shorter_than_what_is_tested(models_folder: Path) -> None:
    """Else the test above would not notice a mask that forgets it."""
    model = build(models_folder, "mistral")
    _, apart = samples(model)
    longest = max(len(e.input_ids) for e in apart) + model.vision_tower.num_tokens - 1
    assert model.config.sliding_window < longest


def test_one_example_of_a_pack_never_moves_another(models_folder: Path) -> None:
    model = build(models_folder, "qwen2")
    shared, apart = samples(model)

    def logits(rows: list) -> torch.Tensor:
        batch = Collator(model.vision_tower.num_tokens, 1)(rows)
        batch.pop("metadata")
        with torch.no_grad():
            return model(**batch).logits

    changed = copy.deepcopy(apart[0])
    changed.input_ids[1] = 7
    changed.pixel_values = 255 - changed.pixel_values
    one, other = logits([[apart[0], apart[3]]]), logits([[changed, apart[3]]])
    trained = sum(label != -100 for label in apart[3].labels)
    assert torch.equal(one[-trained:], other[-trained:]) and not torch.equal(one[:3], other[:3])

    branch = copy.deepcopy(shared[0])
    first = branch.branches.index(1)
    branch.input_ids[first] = 7  # the first answer's first word
    one, other = logits([shared[0]]), logits([branch])
    last = branch.branches.count(3)
    assert torch.equal(one[-last:], other[-last:]) and not torch.equal(one, other)


def test_who_sees_whom() -> None:
    def ids(text: str) -> torch.Tensor:
        return torch.tensor([[int(letter) for letter in text]])

    seen = shared_prefix_mask(ids("11111220"), ids("00122000"), ids("01223010"))[0, 0]
    drawn = ["".join("x" if cell else "." for cell in row) for row in seen.tolist()]
    assert drawn == [
        "x.......",
        "xx......",
        "xxx.....",
        "xx.x....",
        "xx.xx...",
        ".....x..",
        ".....xx.",
        ".......x",
    ]
    near = shared_prefix_mask(ids("1111"), ids("0012"), ids("0122"), window=2)[0, 0]
    assert near.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]


@st.composite
def any_example(draw: st.DrawFn) -> Example:
    """A prompt with images and, at times, an earlier answer in it; then one to four answers."""
    prompt = [5, *draw(st.lists(st.sampled_from([IMAGE_INDEX, 6, 7, 8]), max_size=5))]
    labels = [IGNORE_INDEX, *(t if t == 8 else IGNORE_INDEX for t in prompt[1:])]
    answers = draw(
        st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=4), min_size=1, max_size=4)
    )
    tags = [0] * len(prompt) + [n for n, answer in enumerate(answers, 1) for _ in answer]
    told = [token for answer in answers for token in answer]
    return Example(prompt + told, labels + told, branches=tags if len(answers) > 1 else None)


@given(
    st.lists(st.lists(any_example(), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(1, 3),
)
@settings(max_examples=100, deadline=None)
def test_however_packed_a_token_is_predicted_from_what_it_would_see_alone(
    rows: list, per_image: int
) -> None:
    """Every trained token, with the ids and places that it sees, against a plain loop over the texts."""
    batch = Collator(per_image, 0)(rows)
    if (
        "attention_mask" in batch
    ):  # no pack, no shared prompt: who sees whom is causal attention's business
        segments = batch["attention_mask"]
        branches, places = (
            torch.zeros_like(segments),
            torch.arange(segments.shape[1]).expand_as(segments),
        )
    else:
        segments, branches, places = (
            batch["segment_ids"],
            batch["branch_ids"],
            batch["position_ids"],
        )
    mask = shared_prefix_mask(segments, branches, places)[:, 0].numpy()
    ids, places, found = batch["input_ids"].numpy(), places.numpy(), []
    for position, target in zip(batch["logit_positions"].tolist(), batch["labels"].tolist()):
        row, column = divmod(position, segments.shape[1])
        seen = mask[row, column]
        found.append((ids[row, seen].tolist(), places[row, seen].tolist(), target))
    expected = []
    for example in (example for row in rows for example in row):
        tags = example.branches or [0] * len(example.input_ids)
        for branch in range(1, max(tags) + 1) if example.branches else [0]:
            text: list[int] = []
            for token, label, tag in zip(example.input_ids, example.labels, tags):
                if tag in (0, branch):
                    if label != IGNORE_INDEX:
                        expected.append((text.copy(), list(range(len(text))), label))
                    text += [token] * (per_image if token == IMAGE_INDEX else 1)
    assert sorted(found) == sorted(expected)


def loop_over_texts(
    q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale, sliding_window, **_
) -> torch.Tensor:
    """What a variable-length flash kernel computes, text by text: (positions, heads, width) each."""
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    out = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()):
        keys, values = (
            x[start:end].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v)
        )
        scores = torch.einsum("qhw,khw->hqk", q[start:end], keys) * softmax_scale
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        scores[:, (distance < 0) | (distance >= (sliding_window or 10**9))] = -torch.inf
        out.append(torch.einsum("hqk,khw->qhw", scores.softmax(-1), values))
    return torch.cat(out)


@pytest.mark.parametrize("text", ["mistral", "llama"])
def test_flash_attention_is_told_where_texts_end(
    models_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel needs CUDA; a plain loop stands in its place, behind all that transformers does on the way to it."""
    from transformers import modeling_flash_attention_utils as flash

    def no_kernel(*_: object, **__: object) -> None:
        raise AssertionError("a kernel without lengths would let texts see each other")

    functions = (no_kernel, loop_over_texts, no_kernel, no_kernel, no_kernel)
    monkeypatch.setattr(
        flash, "lazy_import_flash_attention", lambda _: (functions, (lambda **k: _wanted(k), None))
    )
    model = double(models_folder, text, "sdpa")
    _, apart = samples(model)
    rows = [apart[:4], apart[4:]]  # of different lengths: the second is padded
    wanted = loss_and_gradients(model, rows)
    model.config._attn_implementation = "flash_attention_2"
    found = loss_and_gradients(model, rows)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


def _wanted(options: dict) -> dict:
    return {name: options[name] for name in ("softmax_scale", "sliding_window")} | {
        "causal": options["is_causal"]
    }


@pytest.mark.parametrize("text", ["mistral", "llama", "gemma2"])
def test_flex_attention_sees_what_sdpa_sees(
    models_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward alone, uncompiled: on a CPU there is no more of it. Gemma 2 has both kinds of layers and a soft cap."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration

    monkeypatch.setattr(integration.WrappedFlexAttention, "__call__", lambda _: flex_attention)
    model = build(models_folder, text)
    model.language_model.set_attn_implementation("eager")
    shared, apart = samples(model)
    batch = Collator(model.vision_tower.num_tokens, 1)(
        [[shared[0], shared[1]], [apart[0], shared[2]]]
    )
    batch.pop("metadata")
    with torch.no_grad():
        wanted = model(**batch).logits
        model.config._attn_implementation = "flex_attention"
        torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [True, False])
def test_short_attention_is_scaled_dot_product_attention(masked: bool) -> None:
    """In float64, values and gradients; heads share keys, and some padding sees nothing, which must not spread."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 7, 4, dtype=torch.float64).requires_grad_() for heads in (6, 2, 2)
    )
    mask, seen = None, slice(None)
    if masked:
        mask, seen = (torch.rand(2, 1, 7, 7) > 0.4) | torch.eye(7, dtype=torch.bool), slice(0, 5)
        mask[..., 5:, :] = mask[..., 5:] = False
    out, _ = cpu_matmul_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    found = torch.autograd.grad(out[:, seen].cos().sum(), (query, key, value))
    options = {"is_causal": True} if mask is None else {"attn_mask": mask[:, :, seen]}
    wanted = scaled_dot_product_attention(
        query[:, :, seen], key, value, scale=0.3, enable_gqa=True, **options
    )
    torch.testing.assert_close(out[:, seen], wanted.transpose(1, 2), rtol=1e-12, atol=1e-12)
    for one, other in zip(found, torch.autograd.grad(wanted.cos().sum(), (query, key, value))):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_is_not_short_or_does_not_train_is_left_to_sdpa(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []
    monkeypatch.setattr(
        cpu_attention, "sdpa_attention_forward", lambda *args, **_: called.append(args[1].shape[2])
    )
    query, longer = (
        torch.randn(1, 2, 5, 4),
        torch.randn(1, 2, cpu_attention.CPU_ATTENTION_MAX_LENGTH + 1, 4),
    )
    with torch.no_grad():
        cpu_matmul_attention(torch.nn.Module(), query, query, query, None)
    cpu_matmul_attention(torch.nn.Module(), longer, longer, longer, None)
    cpu_matmul_attention(torch.nn.Module(), query, query, query, None, dropout=0.1)
    cpu_matmul_attention(torch.nn.Module(), query, query, query, None, softcap=50.0)
    assert called == [5, cpu_attention.CPU_ATTENTION_MAX_LENGTH + 1, 5, 5]


def test_flash_attention_refuses_a_shared_prompt(models_folder: Path) -> None:
    model = build(models_folder, "llama")
    shared, _ = samples(model)
    model.config._attn_implementation = "flash_attention_2"
    batch = Collator(model.vision_tower.num_tokens, 1)([shared[0]])
    batch.pop("metadata")
    with pytest.raises(ValueError, match="flash_attention_2 .*--share_prefix False"):
        model(**batch)
