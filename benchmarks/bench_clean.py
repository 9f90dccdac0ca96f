"""Clean a folder of images: `llava clean` against the tutorial's single process.

    python benchmarks/bench_clean.py [--count 6000] [--photos FOLDER] [--rounds 2]

The tutorial opens each image with Pillow and runs CLIPImageProcessor on it. The images are photo-like JPEGs
of 320 to 1024 pixels, or copies of the photos in FOLDER; one in 25 is damaged or missing.

Prints images per second of both sides, start-up included; the number of images on which they disagree; and the
largest difference between the pixel values that the two would pass to the vision tower.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import loopback
import numpy as np

OURS, TUTORIAL = "llava clean", "the tutorial's way"
# As in the tutorial, every exception rejects the image, and the result of the image processor is not used.
TUTORIAL_PROCESS = """
import json, os, sys
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

records, folder, output = sys.argv[1:]
processor = CLIPImageProcessorPil()
good = []
for row in json.load(open(records)):
    try:
        image = Image.open(os.path.join(folder, row["image"])).convert("RGB")
        processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
        good.append(row)
    except Exception:
        pass
json.dump(good, open(output, "w"))
"""
FAULTS = ("truncated", "corrupt", "html", "missing")


class Duration(NamedTuple):
    """Duration of a command: wall-clock seconds, and CPU seconds of all its processes."""

    wall: float
    cpu: float


def damage(data: bytes, fault: str) -> bytes:
    """Return the bytes of an image with one of `FAULTS`. For "missing", return them unchanged; they are not written."""
    middle = len(data) // 2
    if fault == "truncated":
        return data[:middle]
    if fault == "corrupt":
        # Overwrite bytes in the middle of the compressed pixels with end-of-image markers and starts of tables.
        return data[:middle] + b"\xff\xd9\x00\xff\xc4" * 3 + data[middle + 15 :]
    if fault == "html":
        return b"<html></html>"
    return data


def write_images(folder: Path, count: int, photos: Path | None) -> dict[str, str]:
    """Write images, and return the kind of each by its file name: "good" or one of `FAULTS`."""
    if photos:
        sources = [path.read_bytes() for path in sorted(photos.glob("*.jpg"))]
    else:
        sources = loopback.images()
    kinds = {}
    for index in range(count):
        data = sources[index % len(sources)]
        kind = "good"
        # Damage every 25th image, and alternate between the kinds of damage.
        if index % 25 == 7:
            kind = FAULTS[index // 25 % len(FAULTS)]
            data = damage(data, kind)
        name = f"{index}.jpg"
        if kind != "missing":
            (folder / name).write_bytes(data)
        kinds[name] = kind
    return kinds


def time_command(command: Sequence[str]) -> Duration:
    """Run a command, and return its duration. An error of the command ends the benchmark."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # The CPU time of child processes is only available as a sum over all of them, so subtract the sum from before this command.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Duration(wall, cpu)


def largest_pixel_difference(folder: Path, names: Sequence[str]) -> int:
    """Return the largest difference between the pixel values of both sides, in gray levels (1/255)."""
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from llava_simplified.data.images import decode_image
    from llava_simplified.data.transforms import ImageTransform

    processor = CLIPImageProcessorPil()
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    transform = ImageTransform(
        resize=224,
        crop=(224, 224),
        interpolation="bicubic",
        mean=tuple(mean),
        std=tuple(std),
    )
    # Size of one gray level after normalization, for each channel.
    gray_level = 1 / (255 * std[:, None, None])
    largest = 0.0
    for name in names:
        image = Image.open(folder / name).convert("RGB")
        theirs = processor(image, return_tensors="np")["pixel_values"][0]
        pixels = transform(decode_image((folder / name).read_bytes()))
        ours = transform.normalize(pixels).numpy()
        largest = max(largest, float((np.abs(ours - theirs) / gray_level).max()))
    return round(largest)


def print_speed(best: dict[str, Duration], startup: dict[str, Duration], count: int) -> None:
    """Print the speed of both sides, and the ratios of the tutorial's time to ours."""
    for side, duration in best.items():
        cpu_per_image = (duration.cpu - startup[side].cpu) / count * 1000
        print(
            f"{side:20} {count / duration.wall:7,.0f} images/s, start-up "
            f"({startup[side].wall:.1f} s) included; {cpu_per_image:.2f} ms CPU per image without it"
        )
    ours, tutorial = best[OURS], best[TUTORIAL]
    wall_ratio = (tutorial.wall - startup[TUTORIAL].wall) / (ours.wall - startup[OURS].wall)
    cpu_ratio = (tutorial.cpu - startup[TUTORIAL].cpu) / (ours.cpu - startup[OURS].cpu)
    print(
        f"ratios: wall {tutorial.wall / ours.wall:.2f}, wall without start-up {wall_ratio:.2f}, "
        f"CPU without start-up {cpu_ratio:.2f}"
    )


def print_disagreements(
    kinds: dict[str, str], kept_by_ours: set[str], kept_by_tutorial: set[str]
) -> None:
    """Print the number of images on which the two sides disagree, and the number of our wrong decisions."""
    rejected_by_ours = kept_by_tutorial - kept_by_ours
    rejected_by_tutorial = kept_by_ours - kept_by_tutorial
    wrong = [image for image, kind in kinds.items() if (kind == "good") != (image in kept_by_ours)]
    rejected_kinds = sorted({kinds[image] for image in rejected_by_ours})
    print(
        f"rejected by {OURS} only: {len(rejected_by_ours)} {rejected_kinds}; "
        f"rejected by the tutorial only: {len(rejected_by_tutorial)}; "
        f"wrong decisions of {OURS}: {len(wrong)}"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=6000, help="Number of images")
    parser.add_argument("--photos", type=Path, help="Folder of JPEG files to use as images")
    parser.add_argument(
        "--rounds", type=int, default=2, help="Runs of each side; the fastest is reported"
    )
    args = parser.parse_args()
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        images, tower, records = root / "images", root / "tower", root / "records.json"
        outputs = {OURS: root / "ours.json", TUTORIAL: root / "theirs.json"}
        images.mkdir()
        kinds = write_images(images, args.count, args.photos)
        CLIPImageProcessorPil().save_pretrained(tower)
        rows = [{"image": image, "instruction": "Caption:", "response": "x"} for image in kinds]

        ours = [sys.executable, "-m", "llava_simplified.cli", "clean", str(records)]
        ours += ["--output", str(outputs[OURS]), "--image-folder", str(images)]
        ours += ["--vision_tower", str(tower)]
        tutorial = [sys.executable, "-c", TUTORIAL_PROCESS]
        tutorial += [str(records), str(images), str(outputs[TUTORIAL])]
        commands = {OURS: ours, TUTORIAL: tutorial}

        # A run on one record measures the start-up.
        records.write_text(json.dumps(rows[:1]))
        startup = {side: time_command(command) for side, command in commands.items()}
        # The measured runs must not find the outputs of these runs.
        for output in outputs.values():
            output.unlink()
        records.write_text(json.dumps(rows))
        best: dict[str, Duration] = {}
        for _ in range(args.rounds):
            for side, command in commands.items():
                duration = time_command(command)
                best[side] = min(best.get(side, duration), duration)

        kept = {}
        for side, output in outputs.items():
            kept[side] = {row["image"] for row in json.loads(output.read_text())}
        print_speed(best, startup, args.count)
        print_disagreements(kinds, kept[OURS], kept[TUTORIAL])
        good = [image for image, kind in kinds.items() if kind == "good"]
        difference = largest_pixel_difference(images, good[:60])
        print(f"pixels differ by at most {difference} of 255 gray levels")


if __name__ == "__main__":
    main()
