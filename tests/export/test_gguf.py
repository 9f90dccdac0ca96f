"""Read exported GGUF files with transformers, with llama.cpp's graph in plain torch, and with llama.cpp itself."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import test_prompt
import torch
from checkpoints import TrainPair
from PIL import Image
from tiny import make_tokenizer, save_llava
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import conv2d, gelu, layer_norm, linear
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from llava_simplified.data.images import load_pixels
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.export import gguf_export
from llava_simplified.export.chat_template import stock_chat_template
from llava_simplified.export.export_command import export_main
from llava_simplified.export.gguf_export import export_gguf
from llava_simplified.export.gguf_tokenizer import vocabulary_settings
from llava_simplified.export.gguf_vision import describe_padding_difference
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IMAGE_INDEX, Message, Prompt

# Vision tower, language model, and options of the training run.
MODELS = [
    ("clip", "llama", {"mm_projector_type": "mlp2x_gelu"}),
    ("siglip", "qwen2", {"mm_projector_type": "linear"}),
    ("clip", "mistral", {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": ["-1", "1"]}),
]


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the keys and the tensors of a GGUF file."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        tensors[tensor.name] = torch.from_numpy(np.array(tensor.data))
    return keys, tensors


def run_clip_graph(path: Path, pixels: torch.Tensor) -> torch.Tensor:
    """Compute the image tokens as llama.cpp's `clip_graph_llava` does, from the file alone.

    Args:
        path: `mmproj.gguf`.
        pixels: (1, 3, side, side), normalised.

    Returns:
        The image tokens, (patches, width of the language model).
    """
    keys, weights = read_gguf(path)
    vision = {name.removeprefix("clip.vision."): value for name, value in keys.items()}
    num_heads = vision["attention.head_count"]
    epsilon = vision["attention.layer_norm_epsilon"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return layer_norm(x, x.shape[-1:], weight, bias, epsilon)

    def matrix(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attention(x: torch.Tensor, block: str) -> torch.Tensor:
        q, k, v = (
            matrix(x, f"{block}.attn_{part}").unflatten(1, (num_heads, -1)).transpose(0, 1)
            for part in "qkv"
        )
        attn_weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return matrix((attn_weights @ v).transpose(0, 1).flatten(1), f"{block}.attn_out")

    def feed_forward(x: torch.Tensor, block: str) -> torch.Tensor:
        x = matrix(x, f"{block}.ffn_up")
        if keys["clip.use_gelu"]:
            x = gelu(x, approximate="tanh")
        else:
            x = x * torch.sigmoid(1.702 * x)
        return matrix(x, f"{block}.ffn_down")

    patch_filter = weights["v.patch_embd.weight"]
    patch_bias = weights.get("v.patch_embd.bias")
    x = conv2d(pixels, patch_filter, patch_bias, vision["patch_size"]).flatten(2)[0].T
    has_cls = "v.class_embd" in weights
    if has_cls:
        x = torch.cat([weights["v.class_embd"][None], x])
    x = x + weights["v.position_embd.weight"]
    if "v.pre_ln.weight" in weights:
        x = norm(x, "v.pre_ln")
    hidden_states = []
    deepest = max(vision["feature_layer"])
    assert deepest <= vision["block_count"]
    for i in range(deepest):
        if i in vision["feature_layer"]:
            hidden_states.append(x)
        block = f"v.blk.{i}"
        x = x + attention(norm(x, f"{block}.ln1"), block)
        x = x + feed_forward(norm(x, f"{block}.ln2"), block)
    patches = torch.cat([*hidden_states, x], dim=1)[int(has_cls) :]
    return matrix(gelu(matrix(patches, "mm.0")), "mm.2")


# ---- whole exports ----


@pytest.mark.slow
@pytest.mark.parametrize(("tower", "language_model", "options"), MODELS)
def test_export_gguf_gives_equal_results_in_other_readers(
    train_pair: TrainPair,
    data_folder: Path,
    tmp_path: Path,
    tower: str,
    language_model: str,
    options: dict,
) -> None:
    checkpoint = train_pair(tower, language_model, **options)
    folder = tmp_path / "gguf"
    assert export_gguf(checkpoint, folder) > 60
    model = Llava.from_pretrained(checkpoint, merge=True)

    # transformers' reader assumes the original vocabulary for a Qwen2, unless it is given a config.
    given = {"config": model.language_model.config} if language_model == "qwen2" else {}
    other = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32, **given
    ).eval()
    ids = model.prompt.render([Message("user", "a red car")], None).input_ids
    with torch.no_grad():
        expected_logits = model.language_model(torch.tensor([ids])).logits
        logits = other(torch.tensor([ids])).logits
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)

    transform = model.vision_tower.transform
    image = load_pixels(data_folder / "images" / "0.jpg")
    pixels = transform.normalize(transform(image)[None])
    with torch.no_grad():
        expected_tokens = model.projector(model.vision_tower(pixels))[0]
    tokens = run_clip_graph(folder / "mmproj.gguf", pixels)
    torch.testing.assert_close(tokens, expected_tokens, rtol=1e-4, atol=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    for text in ("party in the park", "two dogs, 1234 ünïcödé\n  [INST] I'll"):
        expected_ids = model.tokenizer.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == expected_ids

    context_length = model.language_model.config.max_position_embeddings
    if language_model == "mistral":
        context_length = 24  # its sliding window, which llama.cpp does not have
    architecture = "qwen2" if language_model == "qwen2" else "llama"
    keys, _ = read_gguf(folder / "model.gguf")
    assert keys[f"{architecture}.context_length"] == context_length


@pytest.mark.slow
def test_export_gguf_makes_servers_render_the_training_prompt(
    train_pair: TrainPair, tmp_path: Path
) -> None:
    """llama.cpp inserts its image marker without a line break; other tools pass a list of parts."""
    tower, language_model, options = MODELS[0]
    checkpoint = train_pair(tower, language_model, **options)
    folder = tmp_path / "gguf"
    export_gguf(checkpoint, folder, dtype="bfloat16")
    keys, _ = read_gguf(folder / "model.gguf")
    assert keys["tokenizer.ggml.add_bos_token"] is True
    model = Llava.from_pretrained(checkpoint)
    turns = [Message("user", f"<image>\n{model.instruction}")]
    expected_ids = model.prompt.render(turns, None).input_ids
    template = jinja2.Environment().from_string(keys["tokenizer.chat_template"])
    for marker in ("<__media__>", "<__media_x7__>"):
        parts = [{"type": "text", "text": marker}, {"type": "text", "text": model.instruction}]
        for content in (marker + model.instruction, f"{marker}\n{model.instruction}", parts):
            messages = [{"role": "user", "content": content}]
            text = template.render(messages=messages, bos_token="<s>", eos_token="</s>")
            before, after = text.split(marker)
            ids_before = model.tokenizer.encode(before, add_special_tokens=False)
            ids_after = model.tokenizer.encode(after, add_special_tokens=False)
            assert [*ids_before, IMAGE_INDEX, *ids_after] == expected_ids

    modelfile = (folder / "Modelfile").read_text()
    start = 'FROM ./model.gguf\nFROM ./mmproj.gguf\nTEMPLATE """[INST] {{'
    assert modelfile.startswith(start)
    assert 'stop "</s>"' in modelfile

    types = {}
    for tensor in gguf.GGUFReader(folder / "mmproj.gguf").tensors:
        types[tensor.name] = tensor.tensor_type.name
    for matrix in ("v.blk.0.attn_q.weight", "mm.2.weight"):
        assert types[matrix] == "BF16"
    for vector in ("v.blk.0.ln1.weight", "v.patch_embd.weight", "v.position_embd.weight"):
        assert types[vector] == "F32"


# Writes a mark after the last message only, so a question looks different when an answer follows.
LAST_MARKED = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% if loop.last %}{{ '!' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.mark.parametrize(
    "name", ["CHATML", "QWEN3", "LLAMA3", "GEMMA", "LLAMA2", "ZEPHYR", "ALPACA"]
)
def test_exported_template_begins_answers_as_in_training(name: str) -> None:
    """Qwen 3 writes an empty block of thoughts in a conversation only, and Alpaca a space in a prompt only."""
    tokenizer = make_tokenizer(getattr(test_prompt, name))
    model: Any = SimpleNamespace(prompt=Prompt(tokenizer), tokenizer=tokenizer, instruction="What?")
    gguf_export._check_template(model)
    expected = model.prompt.render([Message("user", "What?")], None).input_ids
    # With a list of parts, as Transformers' processors pass them.
    template = stock_chat_template(model)
    content = [{"type": "text", "text": "What?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert tokenizer.encode(text, add_special_tokens=False) == expected


def test_export_gguf_refuses_a_template_that_cannot_render_the_training_prompt() -> None:
    tokenizer = make_tokenizer(LAST_MARKED)
    model: Any = SimpleNamespace(prompt=Prompt(tokenizer), tokenizer=tokenizer, instruction="What?")
    with pytest.raises(ValueError, match="llama.cpp would render .* trained with"):
        gguf_export._check_template(model)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("tower", "language_model", "options", "message"),
    [
        ("clip", "gemma2", {}, "language models, not gemma2"),
        ("vit", "llama", {}, "CLIP and SigLIP towers, not vit"),
        ("clip", "llama", {"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
        ("clip", "llama", {"mm_projector_type": "mlp3x_gelu"}, "two layers, but this one has 3"),
    ],
)
def test_export_gguf_refuses_what_llamacpp_does_not_support(
    models_folder: Path,
    tmp_path: Path,
    tower: str,
    language_model: str,
    options: dict,
    message: str,
) -> None:
    checkpoint = save_llava(models_folder, tmp_path / "out", language_model, tower, **options)
    with pytest.raises(ValueError, match=message):
        export_gguf(checkpoint, tmp_path / "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing may be left behind"


@pytest.mark.medium
def test_export_gguf_removes_a_file_that_was_written_wrongly(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_llava(models_folder, tmp_path / "out", "llama")
    write = gguf_export._write

    def write_wrongly(path: Path, *args: Any) -> None:
        write(path, *args)
        data = bytearray(path.read_bytes())
        data[-40] ^= 1  # one bit of the last tensor
        path.write_bytes(data)

    monkeypatch.setattr(gguf_export, "_write", write_wrongly)
    with pytest.raises(ValueError, match=r"model.gguf: .*output\.weight "):
        export_gguf(checkpoint, tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def resize_as_llamacpp(image: Image.Image, side: int) -> np.ndarray:
    """Return what llama.cpp's `img_tool::resize` returns with PAD_CEIL, except for its interpolation."""
    scale = min(side / image.width, side / image.height)
    width = min(int(np.ceil(image.width * scale)), side)
    height = min(int(np.ceil(image.height * scale)), side)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((side - width) // 2, (side - height) // 2))
    return np.asarray(square)


@pytest.mark.parametrize(
    "size", [(301, 200), (97, 411), (64, 64), (23, 500), (233, 232), (640, 359)]
)
def test_padded_images_are_those_of_llamacpp(models_folder: Path, size: tuple[int, int]) -> None:
    """The borders have the same color, and their positions differ by at most one pixel."""
    transform = replace(
        ImageTransform.from_pretrained(models_folder / "clip", "pad"), resize=224, crop=(224, 224)
    )
    assert describe_padding_difference(transform) == ""
    assert "(127, 127, 127)" in describe_padding_difference(
        replace(transform, pad_color=(127, 127, 127))
    )
    assert "--image_aspect_ratio pad" in describe_padding_difference(
        replace(transform, pad_color=None)
    )
    x, y = np.meshgrid(np.linspace(150, 250, size[0]), np.linspace(0, 90, size[1]))
    pixels = np.stack([x, y, np.full_like(x, 250)], axis=2).astype(np.uint8)
    ours = transform(pixels).permute(1, 2, 0).numpy().astype(int)
    theirs = resize_as_llamacpp(Image.fromarray(pixels), 224).astype(int)
    # Compare the two lines through the center. Blue is 250 in the image and 104 in the borders.
    for line, other in ((ours[112], theirs[112]), (ours[:, 112], theirs[:, 112])):
        inside, other_inside = line[:, 2] > 177, other[:, 2] > 177
        assert (inside != other_inside).sum() <= 2
        # All pixels are equal, except at the edges, which the filter of the resize blurs.
        edges = np.zeros(224, bool)
        for shift in range(-4, 5):
            edges |= np.roll(inside, shift) != other_inside
        assert np.abs(line - other)[~edges].max() <= 5  # half a pixel of the steepest slope


@pytest.mark.medium
@pytest.mark.parametrize(
    ("aspect_ratio", "warns"),
    [
        ("crop", True),
        ("pad", False),
    ],
)
def test_export_gguf_warns_if_llamacpp_adds_borders(
    models_folder: Path,
    tmp_path: Path,
    package_log: pytest.LogCaptureFixture,
    aspect_ratio: str,
    warns: bool,
) -> None:
    checkpoint = save_llava(
        models_folder, tmp_path / "out", "llama", image_aspect_ratio=aspect_ratio
    )
    export_gguf(checkpoint, tmp_path / "gguf")
    assert ("llama.cpp makes images square" in package_log.text) == warns


# ---- tokenizer ----


def wrap_tokenizer(backend: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer that has the tokens <s> and </s> as a transformers tokenizer."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **tokens
    )


def model_with_tokenizer(tokenizer: PreTrainedTokenizerFast, num_rows: int) -> Any:
    """Return the part of a model that `vocabulary_settings` uses, with `num_rows` embeddings."""
    embeddings = SimpleNamespace(weight=torch.empty(num_rows, 1))
    language_model = SimpleNamespace(get_input_embeddings=lambda: embeddings)
    return SimpleNamespace(
        tokenizer=tokenizer, language_model=language_model, prompt=Prompt(tokenizer, "plain")
    )


def train_sentencepiece_tokenizer(prefix: str) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer with byte fallback.

    Args:
        prefix: Where the "▁" in front of a text comes from: a normalizer "Prepend" as in Llama 2, or
            the pre-tokenizer's scheme "first", as transformers 5 builds it.
    """
    texts = ["a bedroom with a double bed", "the bed in the bedroom", "a bad day, déjà vu"] * 5
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if prefix == "Prepend":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.ByteFallback()
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    # The trainer can only add the bytes as special tokens, which they are not.
    spec = json.loads(backend.to_str())
    added = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    spec["added_tokens"] = added
    return wrap_tokenizer(Tokenizer.from_str(json.dumps(spec)), unk_token="<unk>")


def tokenize_as_llamacpp(text: str, pieces: dict[str, int], scores: Sequence[float]) -> list[int]:
    """Tokenize as llama.cpp: join the pair whose union has the highest score, until none is left."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        candidates = []
        for position, (first, second) in enumerate(pairwise(symbols)):
            if first + second in pieces:
                candidates.append((scores[pieces[first + second]], -position))
        if not candidates:
            break
        position = -max(candidates)[1]  # the leftmost of the best
        symbols[position : position + 2] = [symbols[position] + symbols[position + 1]]
    ids = []
    for symbol in symbols:
        if symbol in pieces:
            ids.append(pieces[symbol])
        else:
            ids += [pieces[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return ids


@pytest.mark.parametrize("prefix", ["Prepend", "first"])
def test_vocabulary_settings_score_sentencepiece_tokens_in_the_order_of_the_merges(
    prefix: str,
) -> None:
    tokenizer = train_sentencepiece_tokenizer(prefix)
    num_rows = len(tokenizer) + 3
    settings = vocabulary_settings(model_with_tokenizer(tokenizer, num_rows))
    keys = {name.removeprefix("tokenizer.ggml."): value for name, value in settings.items()}
    assert keys["model"] == "llama"
    for name in ("tokens", "scores", "token_type"):
        assert len(keys[name]) == num_rows
    types = gguf.TokenType
    assert keys["token_type"][:3] == [types.UNKNOWN, types.CONTROL, types.CONTROL]
    assert keys["token_type"][3] == types.BYTE
    assert keys["token_type"][-1] == types.UNUSED
    assert keys["add_space_prefix"] == (prefix == "Prepend")
    pieces = {piece: token_id for token_id, piece in enumerate(keys["tokens"])}
    for text in ("a double bedroom", "the day déjà 日"):
        expected = tokenizer.encode(text, add_special_tokens=False)
        assert tokenize_as_llamacpp(text, pieces, keys["scores"]) == expected


def split_at(numbers: str) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer of Qwen2 and Llama 3, which differ in the pattern of numbers."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern.replace("NUMBERS", numbers)), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
    "qwen2": split_at(r"\p{N}"),
    "llama-bpe": split_at(r"\p{N}{1,3}"),
    "unknown": pre_tokenizers.Whitespace(),
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_vocabulary_settings_name_the_pre_tokenizer(name: str) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = PRE_TOKENIZERS[name]
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["a b"], trainer)
    model = model_with_tokenizer(wrap_tokenizer(backend), 260)
    if name == "unknown":
        with pytest.raises(ValueError, match="pre-tokenizer"):
            vocabulary_settings(model)
    else:
        assert vocabulary_settings(model)["tokenizer.ggml.pre"] == name


# ---- rotary frequencies ----


def make_llama(rope_parameters: dict, max_position_embeddings: int) -> LlamaForCausalLM:
    """Return a Llama with one head of 128 channels."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=128,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=max_position_embeddings,
        rope_parameters=rope_parameters,
    )
    return LlamaForCausalLM(config)


def llama3_factor(wavelength: float) -> float:
    """Return the divisor of a frequency in Llama 3.1: between 1 and 8, depending on its wavelength."""
    if wavelength < 8192 / 4:
        return 1
    if wavelength > 8192:
        return 8
    smooth = (8192 / wavelength - 1) / 3
    return 1 / ((1 - smooth) / 8 + smooth)


def test_rope_factors_are_those_of_llama3() -> None:
    rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = make_llama(rope_parameters, 65536)
    expected = [llama3_factor(2 * np.pi * 5e5 ** (i / 128)) for i in range(0, 128, 2)]
    factors = gguf_export._rope_factors(model, "llama")["rope_freqs.weight"]
    torch.testing.assert_close(
        factors, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-4
    )


def test_rope_factors_refuse_a_scaling_of_the_attention() -> None:
    rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = make_llama(rope_parameters, 256)
    with pytest.raises(ValueError, match="rotary scaling"):
        gguf_export._rope_factors(model, "llama")


# ---- llama.cpp ----

LLAMA_CPP_PROCESS = """
import json, sys
from llama_cpp import Llama
from llama_cpp.llama_chat_format import MTMDChatHandler

folder, instruction, *images = sys.argv[1:]
handler = MTMDChatHandler(clip_model_path=folder + "/mmproj.gguf", verbose=False)
model = Llama(model_path=folder + "/model.gguf", chat_handler=handler, n_ctx=512, verbose=False)
captions = []
for url in images:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": instruction}]
    done = model.create_chat_completion(
        [{"role": "user", "content": content}], temperature=0, repeat_penalty=1, max_tokens=8
    )
    captions.append(done["choices"][0]["message"]["content"].strip())
print(json.dumps(captions))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("tower", "language_model", "options"), MODELS[:2])
def test_llamacpp_generates_the_same_captions(
    train_pair: TrainPair,
    data_folder: Path,
    tmp_path: Path,
    tower: str,
    language_model: str,
    options: dict,
) -> None:
    """Requires llama-cpp-python, whose compilation takes 20 minutes. The images already have the tower's size."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    if tower == "clip":
        pytest.xfail(
            "llama.cpp shifts the position embeddings of towers with a CLS token (llama.cpp issue 25814)"
        )
    checkpoint = train_pair(tower, language_model, **options)
    export_gguf(checkpoint, tmp_path / "gguf")
    model = Llava.from_pretrained(checkpoint)
    urls = []
    expected = []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        Image.open(data_folder / "images" / f"{number}.jpg").resize((32, 32)).save(path)
        urls.append("data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())
        caption = model.caption(path, max_new_tokens=8)
        expected.append(
            caption.replace("\ufffd", "").strip()
        )  # llama.cpp drops incomplete characters
    argv = [str(tmp_path / "gguf"), model.instruction, *urls]
    command = [sys.executable, "-c", LLAMA_CPP_PROCESS, *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_export_command_refuses_images_that_gguf_would_ignore(tmp_path: Path) -> None:
    argv = [
        str(tmp_path),
        "--format",
        "gguf",
        "--output",
        str(tmp_path / "gguf"),
        "--images",
        "a.png",
    ]
    with pytest.raises(ValueError, match="--images"):
        export_main(argv)
