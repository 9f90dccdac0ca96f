"""Write docs/demo.png: what the demo's model says of drawings that it never saw, the right ones marked.

python docs/make_picture.py --predictions output/demo/predictions.json     # part of `make docs`
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from llava_simplified.demo.assets import fetch
from llava_simplified.evaluation.metrics import word_f1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--predictions",
        type=Path,
        default=Path("output/demo/predictions.json"),
        help="(%(default)s)",
    )
    parser.add_argument(
        "--cache-dir", type=Path, help="where `make demo` keeps models and pictures"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "demo.png")
    args = parser.parse_args()
    folder = fetch(args.cache_dir).images
    rows = json.loads(args.predictions.read_text(encoding="utf-8"))
    chosen = rows[:: max(1, len(rows) // 16)][:16]  # evenly spread, not picked by hand
    figure, axes = plt.subplots(2, 8, figsize=(13, 5.6), dpi=75)
    for axis, row in zip(axes.flat, chosen):
        image = Image.open(folder / row["image"]).convert("RGBA")
        axis.imshow(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))
        score = word_f1(row["pred_output"], [row["gt_caption"]])
        colour = "#1a7f37" if score == 1 else "#9a6700" if score >= 0.5 else "#cf222e"
        axis.set_title(textwrap.fill(row["pred_output"], 20), fontsize=7.5, color=colour)
        axis.set_xlabel(textwrap.fill(row["gt_caption"], 20), fontsize=7, color="#57606a")
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set_visible(False)
    figure.suptitle(
        "above: what the model says of a drawing it never saw; below: the drawing's name",
        fontsize=10,
    )
    figure.tight_layout(h_pad=2.5)
    figure.savefig(args.output)
    Image.open(args.output).convert("RGB").quantize(96).save(
        args.output, optimize=True
    )  # the README carries it


if __name__ == "__main__":
    main()
