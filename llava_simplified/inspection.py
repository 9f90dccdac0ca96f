"""`llava inspect`: samples as the model sees them, and what a whole data file asks of it.

Look here before a run: every token, whether it is trained, and where the image goes. What is printed comes
from the same `Prompt` and `Record` as training itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava_simplified.data.images import decode_image, read_image_bytes
from llava_simplified.data.records import Record, Records
from llava_simplified.data.rows import open_rows
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX, IMAGE_PLACEHOLDER, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED_PROBLEMS = 10  # rows that are named; the others are counted


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 where a row has a problem, else 0."""
    parser = argparse.ArgumentParser(
        "llava inspect",
        description="Show samples as the model sees them: tokens, what is trained, image spans.",
    )
    parser.add_argument("--data", required=True, help="records: .json, .jsonl or .parquet")
    parser.add_argument(
        "--model_name_or_path", required=True, help="language model, or a checkpoint of ours"
    )
    parser.add_argument("--image_folder", help="open the shown samples' images from here")
    parser.add_argument(
        "--vision_tower", help="count the tokens of an image as this vision model gives them"
    )
    parser.add_argument("--mm_vision_select_layer", type=int, nargs="+", default=[-2])
    parser.add_argument(
        "--mm_vision_select_feature", default="patch", choices=["patch", "cls_patch"]
    )
    parser.add_argument(
        "--mm_token_pool", type=int, default=0, help="K x K tokens; 0 keeps the tower's grid"
    )
    parser.add_argument("--template", default="auto", choices=["auto", "chat", "plain", "bare"])
    parser.add_argument(
        "--model_max_length", type=int, help="count the examples that this would cut"
    )
    parser.add_argument(
        "--count", type=int, default=3, help="samples to show (default: %(default)s)"
    )
    parser.add_argument(
        "--scan",
        type=int,
        default=20_000,
        help="rows to add up, evenly spread; 0: all (default: %(default)s)",
    )
    args = parser.parse_args(argv)

    records = Records(open_rows(args.data))
    from llava_simplified.model.build import load_tokenizer

    tokenizer = load_tokenizer(args.model_name_or_path)
    prompt = Prompt(tokenizer, args.template)
    tower = args.vision_tower and image_tokens(
        args.vision_tower,
        args.mm_vision_select_layer,
        args.mm_vision_select_feature,
        args.mm_token_pool,
    )
    console = Console(highlight=False)
    shown, scanned = Totals(tower or 1), Totals(tower or 1)
    for index in range(min(args.count, len(records))):
        if record := shown.add(records, index, prompt):
            console.print(*sample(record, tokenizer, prompt, tower), sep="\n")
            if args.image_folder:
                console.print(
                    *pictures(record, args.image_folder, shown.problems),
                    "",
                    sep="\n",
                    soft_wrap=True,
                )
    step = max(1.0, len(records) / args.scan) if args.scan else 1.0
    for index in range(round(len(records) / step)):
        scanned.add(records, int(index * step), prompt)
    console.print(summary(shown, scanned, len(records), prompt.name, args.model_max_length))
    problems = list(dict.fromkeys([*shown.problems, *scanned.problems]))
    for problem in problems[:NAMED_PROBLEMS]:
        console.print(Text(printable(problem), "red"), soft_wrap=True)
    if len(problems) > NAMED_PROBLEMS:
        console.print(
            Text(f"... and {len(problems) - NAMED_PROBLEMS:,} more rows with a problem", "red")
        )
    return 1 if problems else 0


@dataclass
class Totals:
    """What some rows ask of a model; every response of a row is one example."""

    image_tokens: int  # one image's
    rows: int = 0
    trained: int = 0
    images: int = 0
    lengths: list[int] = field(default_factory=list)  # of each example, an image as one token
    expanded: list[int] = field(
        default_factory=list
    )  # of each example, as the language model sees it
    problems: list[str] = field(default_factory=list)

    def add(self, records: Records, index: int, prompt: Prompt) -> Record | None:
        """Render row `index`; None, and a problem more, where that cannot be trained on."""
        self.rows += 1
        try:
            record = records[index]
            prefix, branches = prompt.render_branches(record.turns, record.responses, record.id)
            if not branches:
                raise ValueError(f"{record.id}: no response to train on")
        except ValueError as error:
            self.problems.append(str(error))
            return None
        images = prefix.input_ids.count(IMAGE_INDEX)
        for branch in branches:
            self.lengths.append(len(prefix.input_ids) + len(branch))
            self.expanded.append(self.lengths[-1] + images * (self.image_tokens - 1))
            self.trained += sum(label != IGNORE_INDEX for label in prefix.labels) + len(branch)
            self.images += images
        return record


def image_tokens(
    name_or_path: str, select_layer: Sequence[int], select_feature: str, token_pool: int
) -> int:
    """How many tokens this vision tower makes of an image; its weights are not read."""
    from transformers import AutoConfig

    from llava_simplified.data.transforms import ImageTransform
    from llava_simplified.model.vision import VisionTower

    config = AutoConfig.from_pretrained(name_or_path)
    config = getattr(config, "vision_config", config)
    transform = ImageTransform.from_pretrained(name_or_path)
    return VisionTower.from_config(
        config,
        transform,
        select_layer=select_layer,
        select_feature=select_feature,
        token_pool=token_pool,
    ).num_tokens


def sample(
    record: Record, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tower: int | None
) -> Iterable[Text | Table]:
    """The first example of a record, token by token. `tower`: tokens of an image, where that is known."""
    ids, labels = prompt.render(record.turns, record.responses[0], record.id)
    table = Table(
        "position", "token", "id", "trained", box=None, header_style="bold", padding=(0, 2, 0, 0)
    )
    position = 0
    for token, label in zip(ids, labels):
        span = (tower or 1) if token == IMAGE_INDEX else 1
        where = f"{position}-{position + span - 1}" if span > 1 else str(position)
        position += span
        if token == IMAGE_INDEX:
            name = f"{IMAGE_PLACEHOLDER} x {tower}" if tower else IMAGE_PLACEHOLDER
            table.add_row(where, Text(name), "", "image", style="magenta")
        else:
            name, trained = token_text(tokenizer, token), label != IGNORE_INDEX
            style = "bold green" if trained else "dim"
            table.add_row(where, Text(name), str(token), "yes" if trained else "-", style=style)
    trained_ids = sum(label != IGNORE_INDEX for label in labels)
    more = f" (the first of {len(record.responses)} responses)" if len(record.responses) > 1 else ""
    yield Text(f"{record.id}{more}  {printable(', '.join(record.images)) or 'no image'}", "bold")
    yield table
    yield Text(f"{position} tokens, {trained_ids} trained ({trained_ids / position:.0%})\n")


def token_text(tokenizer: Any, token: int) -> str:
    """What a token stands for, on one line: a space as `␣`, what cannot be printed escaped."""
    # Decoded behind an x, as a decoder may drop the first space; bytes that are no letter keep their name.
    x = tokenizer.encode("x", add_special_tokens=False)
    decode = tokenizer.backend_tokenizer.decode
    text = decode([*x, token], skip_special_tokens=False)[
        len(decode(x, skip_special_tokens=False)) :
    ]
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        text = tokenizer.convert_ids_to_tokens(token)
    return printable(text).replace(" ", "␣")


def printable(text: str) -> str:
    """Data may hold what would command a terminal or turn its writing round: shown, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def pictures(record: Record, folder: str, problems: list[str]) -> Iterable[Text]:
    """Open the images of a record as training would; one that cannot be read is a problem more."""
    for name in record.images:
        try:
            height, width, _ = decode_image(read_image_bytes(name, folder)).shape
            yield Text(f"{printable(name)}: {width} x {height} pixels")
        except ValueError as error:
            problems.append(f"{record.id}: {error}")


def summary(
    shown: Totals, scanned: Totals, rows: int, template: str, model_max_length: int | None
) -> Table:
    """Totals of the shown samples beside those of the file."""
    part = "the file" if scanned.rows == rows else f"{scanned.rows:,} of {rows:,} rows"
    table = Table("", "shown", part, title=f"{template} template", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, value: Callable[[Totals], str]) -> None:
        table.add_row(name, value(shown), value(scanned))

    row("rows", lambda t: f"{t.rows:,}")
    row("examples", lambda t: f"{len(t.lengths):,}")
    row("tokens", lambda t: f"{sum(t.expanded):,}")
    row("  of images", lambda t: f"{t.images * t.image_tokens:,}")
    row("  trained", lambda t: f"{t.trained:,}")
    row("share trained", lambda t: f"{t.trained / max(1, sum(t.expanded)):.1%}")
    row("mean length", lambda t: f"{sum(t.expanded) / max(1, len(t.expanded)):.1f}")
    row("longest", lambda t: f"{max(t.expanded, default=0):,}")
    if model_max_length:
        row(
            f"cut at {model_max_length}",
            lambda t: f"{sum(n > model_max_length for n in t.lengths):,}",
        )
    row("rows with a problem", lambda t: f"{len(t.problems):,}")
    return table
