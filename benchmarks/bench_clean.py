"""Clean a folder of images: `llava clean` against the tutorial's single process.

    python benchmarks/bench_clean.py [--count 6000] [--photos FOLDER] [--rounds 2]

The tutorial opens each image with Pillow and runs CLIPImageProcessor on it. The images are photo-like JPEGs
of 320 to 1024 pixels, or copies of the photos in FOLDER; one in 25 is broken.

Prints images per second of both, start-up included; the images on which they disagree; and the largest
difference between the pixel values that the two would pass to the vision tower.
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
    """Seconds of a command: of the clock, and of the CPU in all its processes."""

    wall: float
    cpu: float


def damage(data: bytes, fault: str) -> bytes:
    """Return the bytes of a broken image."""
    middle = len(data) // 2
    if fault == "truncated":
        return data[:middle]
    if fault == "corrupt":
        return data[:middle] + b"\xff\xd9\x00\xff\xc4" * 3 + data[middle + 15 :]
    if fault == "html":
        return b"<html></html>"
    return data


def write_images(folder: Path, count: int, photos: Path | None) -> dict[str, str]:
    """Write images, and return what each file name is: "good" or one of `FAULTS`."""
    if photos:
        sources = [path.read_bytes() for path in sorted(photos.glob("*.jpg"))]
    else:
        sources = loopback.images()
    kinds = {}
    for index in range(count):
        data = sources[index % len(sources)]
        kind = "good"
        # Every 25th image is damaged, by each kind of damage in turn.
        if index % 25 == 7:
            kind = FAULTS[index // 25 % len(FAULTS)]
            data = damage(data, kind)
        name = f"{index}.jpg"
        if kind != "missing":
            (folder / name).write_bytes(data)
        kinds[name] = kind
    return kinds


def time_command(command: Sequence[str]) -> Duration:
    """Run a command that must succeed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Duration(wall, cpu)


def largest_pixel_difference(folder: Path, names: Sequence[str]) -> int:
    """Return the largest difference of the two sides' pixel values, in gray levels."""
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from llava_simplified.data.images import decode_image
    from llava_simplified.data.transforms import ImageTransform

    processor = CLIPImageProcessorPil()
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    transform = ImageTransform(224, (224, 224), "bicubic", tuple(mean), tuple(std))
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
    """Print the speed of both sides, and the ratios."""
    for side, duration in best.items():
        cpu_per_image = (duration.cpu - startup[side].cpu) / count * 1000
        print(
            f"{side:20} {count / duration.wall:7,.0f} images/s, start-up "
            f"({startup[side].wall:.1f} s) included; {cpu_per_image:.2f} ms CPU per image without it"
        )
    ours, tutorial = best[OURS], best[TUTORIAL]
    started_wall = (tutorial.wall - startup[TUTORIAL].wall) / (ours.wall - startup[OURS].wall)
    started_cpu = (tutorial.cpu - startup[TUTORIAL].cpu) / (ours.cpu - startup[OURS].cpu)
    print(
        f"ratios: wall {tutorial.wall / ours.wall:.2f}, wall without start-up {started_wall:.2f}, "
        f"CPU without start-up {started_cpu:.2f}"
    )


def print_disagreements(kinds: dict[str, str], kept_by_us: set[str], kept_there: set[str]) -> None:
    """Print on which images the two sides disagree."""
    only_there = kept_there - kept_by_us
    only_here = kept_by_us - kept_there
    wrong = [image for image, kind in kinds.items() if (kind == "good") != (image in kept_by_us)]
    print(
        f"rejected here only: {len(only_there)} {sorted({kinds[image] for image in only_there})}; "
        f"rejected there only: {len(only_here)}; our wrong decisions: {len(wrong)}"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
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
