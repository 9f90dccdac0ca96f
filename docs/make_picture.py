"""Write docs/demo.png: captions that the demo's model generated for held-out drawings.

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

EXACT_COLOR, SIMILAR_COLOR, DIFFERENT_COLOR = "#1a7f37", "#9a6700", "#cf222e"


def color_of(score: float) -> str:
    """Return the color of a caption by its word F1 with the name of the drawing."""
    if score == 1:
        return EXACT_COLOR
    return SIMILAR_COLOR if score >= 0.5 else DIFFERENT_COLOR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--predictions",
        type=Path,
        default=Path("output/demo/predictions.json"),
        help="Predictions of the demo (default: %(default)s)",
    )
    parser.add_argument("--cache-dir", type=Path, help="Where `make demo` keeps models and images")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "demo.png")
    args = parser.parse_args()

    folder = fetch(args.cache_dir).images
    rows = json.loads(args.predictions.read_text(encoding="utf-8"))
    # Show evenly spread rows, so that good and bad captions appear as often as in the predictions.
    step = max(1, len(rows) // 16)
    evenly_spread = rows[::step][:16]
    figure, axes = plt.subplots(2, 8, figsize=(13, 5.6), dpi=75)
    for axis, row in zip(axes.flat, evenly_spread):
        image = Image.open(folder / row["image"]).convert("RGBA")
        # The drawings are transparent. Put them on white.
        background = Image.new("RGBA", image.size, "white")
        axis.imshow(Image.alpha_composite(background, image))
        color = color_of(word_f1(row["pred_output"], [row["gt_caption"]]))
        axis.set_title(textwrap.fill(row["pred_output"], 20), fontsize=7.5, color=color)
        axis.set_xlabel(textwrap.fill(row["gt_caption"], 20), fontsize=7, color="#57606a")
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set_visible(False)
    figure.suptitle("above: the generated caption; below: the name of the drawing", fontsize=10)
    figure.tight_layout(h_pad=2.5)
    figure.savefig(args.output)
    # A palette of 96 colors keeps the file small.
    Image.open(args.output).convert("RGB").quantize(96).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
