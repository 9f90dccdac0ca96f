"""Clean a folder of photos: `llava clean` against the tutorial's single process (Pillow + CLIPImageProcessor).

    python benchmarks/bench_clean.py [--count 6000] [--photos FOLDER] [--rounds 2]

The pictures are photo-like JPEGs of 320 to 1024 pixels, or copies of the photos in FOLDER; one in 25 is broken. Prints
pictures per second of both, start-up included, the verdicts they differ in, and the largest difference between the
pixels that the two would give the vision tower.
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
from pathlib import Path

import loopback
import numpy as np

PEER = """
import json, os, sys
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
records, folder, output = sys.argv[1:]
processor, good = CLIPImageProcessorPil(), []
for row in json.load(open(records)):
    try:
        image = Image.open(os.path.join(folder, row["image"])).convert("RGB")
        processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
        good.append(row)
    except Exception:
        pass
json.dump(good, open(output, "w"))
"""
OURS = "import sys; from llava_simplified.prepare.clean_command import main; sys.exit(main(sys.argv[1:]))"


def write_pictures(folder: Path, count: int, photos: Path | None) -> dict[str, str]:
    """{file name: what it is}."""
    good = (
        [path.read_bytes() for path in sorted(photos.glob("*.jpg"))]
        if photos
        else loopback.pictures()
    )
    kinds = {}
    for index in range(count):
        data, kind = good[index % len(good)], "good"
        if index % 25 == 7:
            kind = ("cut", "mid-scan", "page", "missing")[index // 25 % 4]
            middle = len(data) // 2
            data = {"cut": data[:middle], "page": b"<html></html>"}.get(kind, data)
            if kind == "mid-scan":
                data = data[:middle] + b"\xff\xd9\x00\xff\xc4" * 3 + data[middle + 15 :]
        if kind != "missing":
            (folder / f"{index}.jpg").write_bytes(data)
        kinds[f"{index}.jpg"] = kind
    return kinds


def seconds_of(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(wall, CPU) seconds of a command that must succeed, and of its processes."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def pixel_difference(folder: Path, names: list[str]) -> int:
    """The largest difference, in grey levels, of what the tower is given."""
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from llava_simplified.data.images import decode_image
    from llava_simplified.data.transforms import ImageTransform

    processor = CLIPImageProcessorPil()
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    transform = ImageTransform(224, (224, 224), "bicubic", tuple(mean), tuple(std))
    worst = 0.0
    for name in names:
        theirs = processor(Image.open(folder / name).convert("RGB"), return_tensors="np")[
            "pixel_values"
        ][0]
        ours = transform.normalize(transform(decode_image((folder / name).read_bytes()))).numpy()
        worst = max(worst, float((np.abs(ours - theirs) * std[:, None, None]).max() * 255))
    return round(worst)


def main() -> None:
    """Run both in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "images")
        folder.mkdir()
        kinds = write_pictures(folder, args.count, args.photos)
        rows = [{"image": image, "instruction": "Caption:", "response": "x"} for image in kinds]
        records, tower = Path(name, "records.json"), Path(name, "tower")
        records.write_text(json.dumps(rows))
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        CLIPImageProcessorPil().save_pretrained(tower)
        ours = [
            "--output",
            f"{name}/ours.json",
            "--image-folder",
            str(folder),
            "--vision_tower",
            str(tower),
        ]
        commands = {
            "llava clean": [sys.executable, "-c", OURS, str(records), *ours],
            "the tutorial's way": [
                sys.executable,
                "-c",
                PEER,
                str(records),
                str(folder),
                f"{name}/theirs.json",
            ],
        }
        everything = records.read_text()
        records.write_text(json.dumps(rows[:1]))
        startup = {label: seconds_of(command, environment) for label, command in commands.items()}
        records.write_text(everything)
        best = dict.fromkeys(commands, (float("inf"), float("inf")))
        for _ in range(args.rounds):
            for label, command in commands.items():
                best[label] = min(best[label], seconds_of(command, environment))
        for label, (wall, cpu) in best.items():
            print(f"{label:20} {args.count / wall:7,.0f} pictures/s, start-up ({startup[label][0]:.1f} s) included; "
                  f"{(cpu - startup[label][1]) / args.count * 1000:.2f} ms CPU a picture without it")  # fmt: skip
        first, second = best.values()
        net = [[total - start for total, start in zip(best[k], startup[k])] for k in commands]
        ratios = [second[0] / first[0], net[1][0] / net[0][0], net[1][1] / net[0][1]]
        print(
            "ratios: wall {:.2f}, wall once started {:.2f}, CPU once started {:.2f}".format(*ratios)
        )
        kept = {
            who: {row["image"] for row in json.loads(Path(name, f"{who}.json").read_text())}
            for who in ("ours", "theirs")
        }
        extra = sorted({kinds[image] for image in kept["theirs"] - kept["ours"]})
        wrong = [
            image for image, kind in kinds.items() if (kind == "good") != (image in kept["ours"])
        ]
        print(f"set aside here and not there: {len(kept['theirs'] - kept['ours'])} {extra}; "
              f"there and not here: {len(kept['ours'] - kept['theirs'])}; our wrong verdicts: {len(wrong)}")  # fmt: skip
        good = [image for image in kinds if kinds[image] == "good"][:60]
        print(f"pixels differ by at most {pixel_difference(folder, good)}/255")


if __name__ == "__main__":
    main()
