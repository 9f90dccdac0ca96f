"""Attacks on the checkpoint loader: entries are deleted, huge or of another type, and files are truncated.

The rule: in bounded time, loading returns a model, or raises a ValueError or OSError that names the file or its
folder. It never raises another exception, and never executes code from the checkpoint.
"""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import HUGE, OTHER_TYPES, deleted, nested, paths, replaced
from sampling import sample

import llava_simplified
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.evaluation.clip_metrics import ClipEmbedder
from llava_simplified.hub import check_model_config
from llava_simplified.inspection import inspect_command
from llava_simplified.model.build import build_model, load_tokenizer
from llava_simplified.model.checkpoint import read_adapter_config, save_checkpoint
from llava_simplified.model.config import LlavaConfig, TrainedParts, read_checkpoint_config
from llava_simplified.model.llava import Llava
from llava_simplified.model.weights import weight_files
from llava_simplified.prompt import Prompt

MAX_SECONDS = 20.0


def load_model(folder: Path) -> object:
    return Llava.from_pretrained(folder, device="cpu")


def read_llava_config(folder: Path) -> object:
    config = read_checkpoint_config(folder)
    TrainedParts.from_stored(config)
    return LlavaConfig.from_dict(config["architecture"])


def read_tokenizer(folder: Path) -> object:
    return Prompt(load_tokenizer(str(folder)))


# Each JSON file of a checkpoint, and what reads it. The complete model is loaded in the slow tests.
READERS: dict[str, Callable[[Path], object]] = {
    "llava.json": read_llava_config,
    "adapter/adapter_config.json": lambda folder: read_adapter_config(folder / "adapter"),
    "tokenizer_config.json": read_tokenizer,
    "preprocessor_config.json": ImageTransform.from_pretrained,
}


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copied"))


def check(
    load: Callable[[Path], object], folder: Path, what: object, culprit: str | None = None
) -> None:
    """Check that loading follows the rule.

    Args:
        load: Loads a checkpoint, or a part of it.
        folder: The checkpoint.
        what: How the checkpoint was changed, for messages.
        culprit: The error must name this file or its folder; None for any file of the checkpoint.
    """
    start = time.process_time()  # the machine may be busy
    try:
        load(folder)
    except (ValueError, OSError) as error:
        message = str(error)
        if culprit is None:
            named = [path.name for path in folder.rglob("*") if path.is_file()]
            named += ["llava.json", "adapter_config.json", str(folder)]
        elif culprit == "llava.json":
            named = [culprit]
        else:
            named = [Path(culprit).name, str((folder / culprit).parent)]
        assert any(name in message for name in named), (what, message)
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    seconds = time.process_time() - start
    assert seconds < MAX_SECONDS, (what, seconds)


def mutations(content: Any, values: list[Any]) -> Iterator[tuple[object, Any]]:
    """Yield descriptions and variants of a JSON object, each with one wrong entry."""
    for path in paths(content):
        yield (*path, "deleted"), deleted(content, path)
        for value in values:
            yield (*path, repr(value)[:30]), replaced(content, path, value)


@pytest.mark.medium
@pytest.mark.parametrize("name", READERS)
def test_mutated_json_is_read_or_refused_by_name(copied: Path, name: str) -> None:
    path = copied / name
    content = json.loads(path.read_text())
    # Loading a tokenizer takes longer than reading the other files.
    values = [None, "x", [None]] if name == "tokenizer_config.json" else [*OTHER_TYPES, HUGE[0]]
    for what, mutated in mutations(content, values):
        path.write_text(json.dumps(mutated))
        check(READERS[name], copied, what, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*READERS, "tokenizer.json"])
def test_mutated_json_is_loaded_or_refused_by_name(copied: Path, name: str) -> None:
    path = copied / name
    content = json.loads(path.read_text())
    values = [*OTHER_TYPES, *HUGE, nested(90)]
    if name == "tokenizer.json":
        content["model"]["vocab"] = dict(list(content["model"]["vocab"].items())[:3])
        values = [None, "x", -1, [None], {}]
    for what, mutated in sample(mutations(content, values), 15):
        path.write_text(json.dumps(mutated))
        check(load_model, copied, what, name)
        check(ImageTransform.from_pretrained, copied, what, name)


@pytest.mark.parametrize("name", [*READERS, "tokenizer.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000],
    ids=lambda content: content[:5].decode("latin-1"),
)
def test_json_file_of_another_form_is_read_or_refused_by_name(
    copied: Path, name: str, content: bytes
) -> None:
    (copied / name).write_bytes(content)
    check(READERS.get(name, read_tokenizer), copied, (name, content[:10]))


@pytest.mark.medium
def test_checkpoint_with_a_cut_or_missing_file_is_loaded_or_refused_by_name(copied: Path) -> None:
    """Every file is truncated at its beginning, its middle and its end, and deleted."""
    files = sorted(path for path in copied.rglob("*") if path.is_file())
    assert len(files) >= 6
    for path in files:
        whole = path.read_bytes()
        for size in (0, len(whole) // 2, len(whole) - 2):
            path.write_bytes(whole[:size])
            check(load_model, copied, (path.name, size))
        path.unlink()
        check(load_model, copied, (path.name, "missing"))
        path.write_bytes(whole)
    load_model(copied)


@pytest.mark.medium
def test_safetensors_header_cannot_request_memory(copied: Path) -> None:
    path = copied / "projector.safetensors"
    whole = path.read_bytes()
    for length in (2**63 - 1, 2**32, 100_000_001, 5):
        path.write_bytes(length.to_bytes(8, "little") + whole[8:])
        check(load_model, copied, length)


# ---- configs of the parts ----


@pytest.fixture(scope="module")
def full_checkpoint(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with complete models."""
    config = LlavaConfig(str(models_folder / "mistral"), str(models_folder / "clip"))
    folder = tmp_path_factory.mktemp("attacked") / "full"
    save_checkpoint(build_model(config), folder, config, TrainedParts("full", "full"))
    return folder


@pytest.mark.medium
@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_mutated_config_of_a_part_is_loaded_or_refused_by_its_folder(
    full_checkpoint: Path, tmp_path: Path, part: str
) -> None:
    folder = Path(shutil.copytree(full_checkpoint, tmp_path / "copied"))
    path = folder / part / "config.json"
    content = json.loads(path.read_text())
    always = [
        ("hidden_act", "x"),
        ("hidden_size", None),
        ("model_type", {}),
        ("num_hidden_layers", 10**9),
    ]
    for name, value in always:
        path.write_text(json.dumps({**content, name: value}))
        check(load_model, folder, (name, value), f"{part}/config.json")
    for what, mutated in sample(mutations(content, ["x", -1, 10**9, {}, None]), 4):
        path.write_text(json.dumps(mutated))
        check(load_model, folder, what, f"{part}/config.json")


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"vision_config": {"encoder_layers": 10**30}},
        {"depths": [3, 3, 10**9]},
        {"text_config": {"moe": [{"num_local_experts": 10**9}]}},
        [],
        None,
    ],
)
def test_config_of_millions_of_modules_or_of_another_form_is_refused(
    tmp_path: Path, config: object
) -> None:
    """Building such a model would take forever, even on the meta device."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json"))):
        check_model_config(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        {},
        [],
        {"weight_map": {}},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "../other.safetensors"}},
        {"weight_map": {"a": "/etc/hostname"}},
        {"weight_map": {"a": "..\\x"}},
        {"weight_map": ["model.safetensors"]},
    ],
)
def test_index_of_weights_that_names_no_file_beside_it_is_refused(
    tmp_path: Path, index: object
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        weight_files(str(tmp_path))


# ---- code from a checkpoint ----

CODE = "from pathlib import Path\nPath({marker!r}).touch()\nclass Evil: ...\n"


def poison(folder: Path, marker: Path, known_type: bool) -> None:
    """Add a Python file to a folder, and let every configuration in the folder refer to a class in this file."""
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    for name, entries in {
        "config.json": {
            "AutoConfig": "evil.Evil",
            "AutoModel": "evil.Evil",
            "AutoModelForCausalLM": "evil.Evil",
        },
        "tokenizer_config.json": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "preprocessor_config.json": {
            "AutoImageProcessor": "evil.Evil",
            "AutoProcessor": "evil.Evil",
        },
    }.items():
        path = folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        content["auto_map"] = entries
        if not known_type:
            for key in ("model_type", "tokenizer_class", "image_processor_type"):
                if key in content:
                    content[key] = "Evil"
        path.write_text(json.dumps(content))


@pytest.mark.medium
@pytest.mark.parametrize("known_type", [True, False])
def test_code_of_a_checkpoint_is_not_executed(
    checkpoint: Path,
    models_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    known_type: bool,
) -> None:
    """No code may run, even if a user, or a script with `yes |`, answers every question with "y"."""
    marker = tmp_path / "executed"
    poisoned = {"checkpoint": checkpoint}
    for name in ("mistral", "clip"):
        poisoned[name] = models_folder / name
    for name, source in poisoned.items():
        poisoned[name] = Path(shutil.copytree(source, tmp_path / name))
        poison(poisoned[name], marker, known_type)
    attempts: list[Callable[[], object]] = [
        lambda: load_model(poisoned["checkpoint"]),
        lambda: Llava.from_pretrained(checkpoint, model_base=str(poisoned["mistral"])),
        lambda: Llava.from_pretrained(checkpoint, vision_tower=str(poisoned["clip"])),
        lambda: read_tokenizer(poisoned["mistral"]),
        lambda: ImageTransform.from_pretrained(poisoned["clip"]),
        lambda: ClipEmbedder(poisoned["clip"]),
        lambda: inspect_command.main(
            ["--data", "x", "--model_name_or_path", str(poisoned["mistral"])]
        ),
    ]
    for attempt in attempts:
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
        try:
            attempt()
        except (ValueError, OSError):
            assert True  # refused, which is as good as ignored
        assert not marker.exists()
        assert sys.stdin.read() == "y\n" * 100, "the user must not be asked"


def test_code_runs_where_it_is_trusted(models_folder: Path, tmp_path: Path) -> None:
    """With `trust_remote_code`, the class in the file is used. Otherwise the tests above would prove nothing."""
    folder = Path(shutil.copytree(models_folder / "mistral", tmp_path / "custom"))
    code = "from transformers import PreTrainedTokenizerFast\nclass Custom(PreTrainedTokenizerFast): ...\n"
    (folder / "custom.py").write_text(code)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "custom.Custom"]}
    settings["tokenizer_class"] = "Custom"
    path.write_text(json.dumps(settings))
    assert type(load_tokenizer(str(folder), trust_remote_code=True)).__name__ == "Custom"
    assert type(load_tokenizer(str(folder))).__name__ != "Custom"


def test_adapter_cannot_name_a_module_to_import(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT imports the module that `megatron_core` names."""
    marker = tmp_path / "executed"
    (tmp_path / "evil_core.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.syspath_prepend(tmp_path)
    path = copied / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())
    content |= {"megatron_config": {"a": 1}, "megatron_core": "evil_core"}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="megatron"):
        load_model(copied)
    assert not marker.exists()


def test_every_loader_passes_trust_remote_code() -> None:
    """Without `trust_remote_code`, Transformers asks the user on the terminal, so every call must pass it."""
    classes = ("Auto", "CLIP", "model_class")
    package = Path(llava_simplified.__file__).parent
    found = 0
    for path in sorted(package.rglob("*.py")):
        code = path.read_text(encoding="utf-8")
        if "from_pretrained" not in code and "from_config" not in code:
            continue
        for node in ast.walk(ast.parse(code)):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr in ("from_pretrained", "from_config") and owner.startswith(classes):
                found += 1
                names = {keyword.arg for keyword in node.keywords}
                # A processor of a fixed class has no code to trust, and passes the argument on.
                assert "trust_remote_code" in names, f"{path}:{node.lineno}: no trust_remote_code"
    assert found >= 15


# ---- templates ----


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ messages.missing.missing }}",
        "{{ raise_exception('no') }}",
        "{% include '/etc/passwd' %}",
        "{{",
        "",
    ],
)
def test_template_of_a_checkpoint_is_harmless(copied: Path, tmp_path: Path, template: str) -> None:
    marker = tmp_path / "executed"
    settings = copied / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    content["chat_template"] = template.replace("MARKER", str(marker))
    settings.write_text(json.dumps(content))
    for path in copied.glob("*.jinja"):
        path.write_text(template.replace("MARKER", str(marker)))
    check(load_model, copied, template)
    assert not marker.exists()
