"""GGUF files, read by others: transformers' own reader, llama.cpp's graph in plain torch, and llama.cpp where it is installed."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gguf
import jinja2
import numpy as np
import pytest
import torch
from PIL import Image
from test_stock import trained
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
from llava_simplified.export import gguf as llamacpp
from llava_simplified.export.gguf import export_gguf, vocabulary
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IMAGE_INDEX, Message, Prompt

MODELS = [
    ("clip", "llama", {"mm_projector_type": "mlp2x_gelu"}),
    ("siglip", "qwen2", {"mm_projector_type": "linear"}),
    ("clip", "mistral", {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": ["-1", "1"]}),
]


def checkpoint_of(
    models: Path, data: Path, output: Path, tower: str, text: str, options: dict
) -> Path:
    parts = {"model_name_or_path": models / text, "vision_tower": models / tower, **options}
    return trained(models, data, output, **parts)


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def image_tokens(path: Path, pixels: torch.Tensor) -> torch.Tensor:
    """What llama.cpp's clip_graph_llava computes, from the file alone. pixels: (1, 3, side, side), normalised."""
    keys, w = read(path)
    values = {name.removeprefix("clip.vision."): value for name, value in keys.items()}
    heads, eps = values["attention.head_count"], values["attention.layer_norm_epsilon"]
    x = (
        conv2d(pixels, w["v.patch_embd.weight"], w.get("v.patch_embd.bias"), values["patch_size"])
        .flatten(2)[0]
        .T
    )
    has_cls = "v.class_embd" in w
    if has_cls:
        x = torch.cat([w["v.class_embd"][None], x])
    x = x + w["v.position_embd.weight"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def matrix(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    if "v.pre_ln.weight" in w:
        x = norm(x, "v.pre_ln")
    stack, deepest = [], max(values["feature_layer"])
    assert deepest <= values["block_count"]
    for block in range(deepest):
        if block in values["feature_layer"]:
            stack.append(x)
        name = f"v.blk.{block}"
        y = norm(x, f"{name}.ln1")
        q, k, v = (
            matrix(y, f"{name}.attn_{part}").unflatten(1, (heads, -1)).transpose(0, 1)
            for part in "qkv"
        )
        y = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + matrix(y, f"{name}.attn_out")
        y = matrix(norm(x, f"{name}.ln2"), f"{name}.ffn_up")
        y = gelu(y, approximate="tanh") if keys["clip.use_gelu"] else y * torch.sigmoid(1.702 * y)
        x = x + matrix(y, f"{name}.ffn_down")
    patches = torch.cat([*stack, x], dim=1)[int(has_cls) :]
    return matrix(gelu(matrix(patches, "mm.0")), "mm.2")


@pytest.mark.slow
@pytest.mark.parametrize(("tower", "text", "options"), MODELS)
def test_others_read_the_same_from_both_files(
    models_folder: Path, data_folder: Path, tmp_path: Path, tower: str, text: str, options: dict
) -> None:
    checkpoint = checkpoint_of(models_folder, data_folder, tmp_path / "out", tower, text, options)
    folder = tmp_path / "gguf"
    assert export_gguf(checkpoint, folder)["equal tensors"] > 60
    model = Llava.from_pretrained(checkpoint, merge=True)
    ids = model.prompt.render([Message("user", "a red car")], None).input_ids
    given = (
        {"config": model.language_model.config} if text == "qwen2" else {}
    )  # the reader assumes Qwen2's own vocabulary
    other = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32, **given
    ).eval()
    with torch.no_grad():
        wanted = model.language_model(torch.tensor([ids])).logits
        torch.testing.assert_close(other(torch.tensor([ids])).logits, wanted, rtol=1e-5, atol=1e-5)
        transform = model.vision_tower.transform
        pixels = transform.normalize(transform(load_pixels(data_folder / "images" / "0.jpg"))[None])
        tokens = model.projector(model.vision_tower(pixels))[0]
    torch.testing.assert_close(
        image_tokens(folder / "mmproj.gguf", pixels), tokens, rtol=1e-4, atol=1e-4
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    for caption in ("party in the park", "two dogs, 1234 ünïcödé\n  [INST] I'll"):
        assert tokenizer.encode(caption, add_special_tokens=False) == model.tokenizer.encode(
            caption
        )
    context = 24 if text == "mistral" else model.language_model.config.max_position_embeddings
    architecture = "qwen2" if text == "qwen2" else "llama"
    assert read(folder / "model.gguf")[0][f"{architecture}.context_length"] == context, (
        "not beyond Mistral's window"
    )


@pytest.mark.slow
def test_servers_render_the_prompt_that_was_trained(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """llama.cpp puts its marker before the words without a line break, other tools hand over a list of parts."""
    checkpoint = checkpoint_of(models_folder, data_folder, tmp_path / "out", *MODELS[0])
    export_gguf(checkpoint, tmp_path / "gguf", dtype="bfloat16")
    keys, _ = read(tmp_path / "gguf" / "model.gguf")
    model = Llava.from_pretrained(checkpoint)
    wanted = model.prompt.render([Message("user", f"<image>\n{model.instruction}")], None).input_ids
    template = jinja2.Environment().from_string(keys["tokenizer.chat_template"])
    for marker in ("<__media__>", "<__media_x7__>"):
        parts = [{"type": "text", "text": marker}, {"type": "text", "text": model.instruction}]
        for content in (marker + model.instruction, f"{marker}\n{model.instruction}", parts):
            said = template.render(
                messages=[{"role": "user", "content": content}], bos_token="<s>", eos_token="</s>"
            )
            before, after = (
                model.tokenizer.encode(text, add_special_tokens=False)
                for text in said.split(marker)
            )
            assert [*before, IMAGE_INDEX, *after] == wanted
    assert keys["tokenizer.ggml.add_bos_token"] is True
    said = (tmp_path / "gguf" / "Modelfile").read_text()
    assert (
        said.startswith('FROM ./model.gguf\nFROM ./mmproj.gguf\nTEMPLATE """[INST] {{')
        and 'stop "</s>"' in said
    )
    kinds = {
        t.name: t.tensor_type.name
        for t in gguf.GGUFReader(tmp_path / "gguf" / "mmproj.gguf").tensors
    }
    assert kinds["v.blk.0.attn_q.weight"] == kinds["mm.2.weight"] == "BF16"
    assert {
        kinds[n] for n in ("v.blk.0.ln1.weight", "v.patch_embd.weight", "v.position_embd.weight")
    } == {"F32"}


@pytest.mark.parametrize(
    ("tower", "text", "options", "message"),
    [
        ("clip", "gemma2", {}, "no GGUF for gemma2 here"),
        ("vit", "llama", {}, "CLIP and SigLIP towers, not vit"),
        ("clip", "llama", {"mm_vision_select_feature": "cls_patch"}, "no cls_patch"),
        ("clip", "llama", {"mm_projector_type": "mlp3x_gelu"}, "two layers, this one 3"),
    ],
)
def test_what_llamacpp_cannot_say_is_refused(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    tower: str,
    text: str,
    options: dict,
    message: str,
) -> None:
    options = {"tune_mm_mlp_adapter": True, "max_steps": 1, **options}
    checkpoint = checkpoint_of(models_folder, data_folder, tmp_path / "out", tower, text, options)
    with pytest.raises(ValueError, match=message):
        export_gguf(checkpoint, tmp_path / "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left behind"


def test_a_file_that_reads_back_otherwise_is_not_left_behind(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"tune_mm_mlp_adapter": True, "max_steps": 1}
    checkpoint = checkpoint_of(
        models_folder, data_folder, tmp_path / "out", "clip", "llama", options
    )

    def write(path: Path, *args: object, true=llamacpp._write) -> None:
        true(path, *args)
        data = bytearray(path.read_bytes())
        data[-40] ^= 1  # one bit of the last tensor
        path.write_bytes(data)

    monkeypatch.setattr(llamacpp, "_write", write)
    with pytest.raises(ValueError, match=r"model.gguf: output.weight reads back otherwise"):
        export_gguf(checkpoint, tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def fast(backend: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **tokens
    )


def shell(tokenizer: PreTrainedTokenizerFast, rows: int) -> SimpleNamespace:
    """As much of a model as the vocabulary looks at."""
    text = SimpleNamespace(
        get_input_embeddings=lambda: SimpleNamespace(weight=torch.empty(rows, 1))
    )
    return SimpleNamespace(
        tokenizer=tokenizer, language_model=text, prompt=Prompt(tokenizer, "plain")
    )


@pytest.mark.parametrize("prefix", ["Prepend", "first"])
def test_sentencepiece_scores_join_as_the_merges_did(prefix: str) -> None:
    texts = ["a bedroom with a double bed", "the bed in the bedroom", "a bad day, déjà vu"] * 5
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if prefix == "Prepend":  # Llama 2
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:  # as transformers 5 builds it
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.ByteFallback()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    )
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [
        token for token in spec["added_tokens"] if not token["content"].startswith("<0x")
    ]
    tokenizer = fast(Tokenizer.from_str(json.dumps(spec)), unk_token="<unk>")
    rows = len(tokenizer) + 3
    keys = {
        k.removeprefix("tokenizer.ggml."): v for k, v in vocabulary(shell(tokenizer, rows)).items()
    }
    assert (
        keys["model"] == "llama"
        and len(keys["tokens"]) == len(keys["scores"]) == len(keys["token_type"]) == rows
    )
    assert (
        keys["token_type"][:3] == [2, 3, 3]
        and keys["token_type"][3] == 6
        and keys["token_type"][-1] == 5
    )
    assert keys["add_space_prefix"] == (prefix == "Prepend")
    place = {piece: i for i, piece in enumerate(keys["tokens"])}
    for text in ("a double bedroom", "the day déjà 日"):
        symbols = list("▁" + text.replace(" ", "▁"))
        while True:  # llama.cpp's way: join the pair whose piece has the best score
            pairs = [
                (keys["scores"][place[a + b]], -i)
                for i, (a, b) in enumerate(pairwise(symbols))
                if a + b in place
            ]
            if not pairs:
                break
            at = -max(pairs)[1]
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
        pieces = [
            p
            for s in symbols
            for p in ([s] if s in place else [f"<0x{byte:02X}>" for byte in s.encode()])
        ]
        assert [place[piece] for piece in pieces] == tokenizer.encode(
            text, add_special_tokens=False
        )


def test_the_way_words_are_cut_is_known_by_its_name() -> None:
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    level = pre_tokenizers.ByteLevel
    cases = {
        "gpt-2": level(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), level(add_prefix_space=False)]
        ),
        **{
            name: pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(pattern.replace("NUMBER", number)), "isolated"),
                    level(add_prefix_space=False, use_regex=False),
                ]
            )
            for name, number in (("qwen2", r"\p{N}"), ("llama-bpe", r"\p{N}{1,3}"))
        },
        "not known here": pre_tokenizers.Whitespace(),
    }
    for name, steps in cases.items():
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = steps, decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            special_tokens=["<s>", "</s>"], initial_alphabet=level.alphabet(), show_progress=False
        )
        backend.train_from_iterator(["a b"], trainer)
        model = shell(fast(backend), 260)
        if name == "not known here":
            with pytest.raises(ValueError, match=name):
                vocabulary(model)
        else:
            assert vocabulary(model)["tokenizer.ggml.pre"] == name


def test_stretched_rotary_frequencies_become_factors() -> None:
    """Llama 3.1's rule, in a loop; a scaling that also scales the attention is refused."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    shape = {
        "vocab_size": 8,
        "hidden_size": 128,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = LlamaForCausalLM(
        LlamaConfig(**shape, max_position_embeddings=65536, rope_parameters=rope)
    )
    wanted = []
    for i in range(0, 128, 2):
        wave = 2 * np.pi * 5e5 ** (i / 128)
        smooth = (8192 / wave - 1) / 3
        wanted.append(
            1 if wave < 8192 / 4 else 8 if wave > 8192 else 1 / ((1 - smooth) / 8 + smooth)
        )
    found = llamacpp._rope_factors(model, "llama")["rope_freqs.weight"]
    torch.testing.assert_close(
        found, torch.tensor(wanted, dtype=torch.float32), rtol=1e-4, atol=1e-4
    )
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(
        LlamaConfig(**shape, max_position_embeddings=256, rope_parameters=rope)
    )
    with pytest.raises(ValueError, match="rotary scaling"):
        llamacpp._rope_factors(model, "llama")


LLAMA_CPP = """
import json, sys
from llama_cpp import Llama
from llama_cpp.llama_chat_format import MTMDChatHandler
folder, instruction, *images = sys.argv[1:]
handler = MTMDChatHandler(clip_model_path=folder + "/mmproj.gguf", verbose=False)
model = Llama(model_path=folder + "/model.gguf", chat_handler=handler, n_ctx=512, verbose=False)
said = []
for url in images:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": instruction}]
    done = model.create_chat_completion([{"role": "user", "content": content}], temperature=0, repeat_penalty=1, max_tokens=8)
    said.append(done["choices"][0]["message"]["content"].strip())
print(json.dumps(said))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("tower", "text", "options"), MODELS[:2])
def test_llamacpp_says_the_same(
    models_folder: Path, data_folder: Path, tmp_path: Path, tower: str, text: str, options: dict
) -> None:
    """Opt-in: needs llama-cpp-python (compiled from its source for some twenty minutes). Square pictures of the tower's size."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    if tower == "clip":
        pytest.xfail(
            "llama.cpp shifts the position embeddings of towers with a CLS token (its issue 25814)"
        )
    checkpoint = checkpoint_of(models_folder, data_folder, tmp_path / "out", tower, text, options)
    export_gguf(checkpoint, tmp_path / "gguf")
    model, urls, wanted = Llava.from_pretrained(checkpoint), [], []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        Image.open(data_folder / "images" / f"{number}.jpg").resize((32, 32)).save(path)
        urls.append("data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())
        wanted.append(
            model.caption(path, max_new_tokens=8).replace("\ufffd", "").strip()
        )  # it leaves half characters out
    words = [sys.executable, "-c", LLAMA_CPP, str(tmp_path / "gguf"), model.instruction, *urls]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == wanted
