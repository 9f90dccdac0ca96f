"""The commands `llava caption`, `llava predict` and `llava chat`.

`predict` is the command of LLaVA's tutorial: it captions a file of records, for evaluation.
`caption` also accepts images, folders and shards. Both run `runner.caption_file`. Modules that are slow
to import are imported only after the arguments are parsed.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_simplified.captioning.caption_text import TextOptions, field_names
from llava_simplified.captioning.endpoint_options import (
    EndpointOptions,
    add_endpoint_options,
    parse_endpoint_options,
    request_fields,
)
from llava_simplified.captioning.finishing import CaptionFinisher
from llava_simplified.captioning.prompts import (
    WeightedPrompt,
    prompt_chooser,
    prompts_use_tags,
    read_prompt_file,
    read_text_lines,
)
from llava_simplified.captioning.sidecars import (
    EXISTING_POLICIES,
    SIDECAR_JOURNAL,
    TAGS_SUFFIX,
    SidecarOptions,
)
from llava_simplified.extras import require_extra
from llava_simplified.model.config import resolve_path
from llava_simplified.options import (
    CommandParser,
    add_batch_size_option,
    add_checkpoint_options,
    add_engine_option,
    add_generation_options,
    add_image_folder_option,
    add_limit_option,
    add_shards_option,
    check_at_least,
    checkpoint_options,
    print_text,
)
from llava_simplified.prompt import Message
from llava_simplified.workers import parse_slice, run_tasks

if TYPE_CHECKING:
    from llava_simplified.captioning.runner import CaptionCounts, CaptionJob
    from llava_simplified.model.generation_options import GenerationOptions

logger = logging.getLogger(__name__)

# A caption ends when this number of words repeats the words before them. It is high enough for lists of similar things,
# such as "red hair, red eyes", which repeat fewer words.
DEFAULT_LOOP_GUARD = 8


# ---- parsers ----


def build_caption_parser() -> CommandParser:
    """Return the parser of `llava caption`."""
    parser = CommandParser("llava caption", "Caption an image, a folder, a shard or records.")
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="source",
        help="Images, folders, glob patterns, .tar shards, or one file of .json, .jsonl or .parquet "
        "records",
    )
    parser.add_argument(
        "--output",
        help="Output file, .jsonl (default: captions.jsonl; the caption of a single image is printed). "
        "With --write, a folder for the sidecar files (default: beside the images)",
    )
    add_checkpoint_options(parser, required=False)
    _add_job_options(parser)
    _add_sidecar_options(parser)
    _add_text_options(parser)
    add_engine_option(parser)
    parser.add_argument(
        "--trials",
        "--num-return-sequences",
        type=int,
        default=1,
        help="Number of captions per image (default: %(default)s)",
    )
    add_generation_options(parser, temperature=0.0)
    parser.add_argument(
        "--start-with",
        default="",
        metavar="TEXT",
        help="Text that every caption begins with; the model continues it",
    )
    parser.add_argument(
        "--forbid",
        metavar="FILE",
        help="Text file of words and phrases that are never generated, one per line",
    )
    add_endpoint_options(parser)
    return parser


def _add_sidecar_options(parser: CommandParser) -> None:
    """Add the options of sidecar files (see `sidecars.SidecarOptions`), and of the review page."""
    group = parser.add_argument_group(
        "sidecar files", "Write the caption of a.jpg into a.txt instead of one output file."
    )
    group.add_argument(
        "--write",
        choices=["txt", "caption"],
        help="Write one file per image with this suffix",
    )
    group.add_argument(
        "--existing",
        choices=EXISTING_POLICIES,
        help="What to do with an image that already has a caption file (default: skip the image)",
    )
    group.add_argument(
        "--separator",
        metavar="TEXT",
        help="Text between the existing text and the caption, for --existing append and prepend; \\n is a "
        "line break (default: ', ')",
    )
    parser.add_argument(
        "--review",
        metavar="PAGE",
        help="HTML page to write with thumbnails of all images and their captions",
    )


def _add_text_options(parser: CommandParser) -> None:
    """Add the options of prompts and texts; see `prompts` and `caption_text.TextOptions`."""
    group = parser.add_argument_group("prompts and texts")
    group.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="Text file of prompts, one per line, as `WEIGHT | PROMPT` or `PROMPT`; one is chosen for each "
        "image. {name}, {folder} and {tags} are replaced by the values of the image",
    )
    group.add_argument(
        "--template",
        default="",
        metavar="TEXT",
        help="Text to write instead of the caption alone, with {caption} and optionally {tags} (from the .txt file beside "
        "the image), {name} and {folder}",
    )
    group.add_argument(
        "--prefix", default="", help="Text to put before each caption; no space is added"
    )
    group.add_argument(
        "--suffix", default="", help="Text to put after each caption; no space is added"
    )
    group.add_argument(
        "--max-words",
        type=int,
        help="Maximum number of generated words, not counting prefix, suffix and template",
    )
    group.add_argument(
        "--loop-guard",
        type=int,
        metavar="N",
        help="End a caption when at least N words repeat the words directly before them; 0 turns this off "
        f"(default: {DEFAULT_LOOP_GUARD} with --write, else 0)",
    )


def build_predict_parser() -> CommandParser:
    """Return the parser of `llava predict` and `predict.py`."""
    parser = CommandParser("llava predict", "Caption the records of a file, or one image.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data-path", help="Records to caption: a .json, .jsonl or .parquet file")
    source.add_argument("--image", help="Image to caption; the caption is printed")
    parser.add_argument(
        "--output",
        help="Output file: .json for an array, .jsonl for JSON lines (default: predictions.json)",
    )
    add_checkpoint_options(parser)
    _add_job_options(parser)
    parser.add_argument(
        "--trials",
        "--num-return-sequences",
        type=int,
        help="Number of captions per image (default: 3; with --temperature 0 or --image: 1)",
    )
    add_generation_options(parser, temperature=0.2)
    return parser


def build_chat_parser() -> CommandParser:
    """Return the parser of `llava chat`."""
    parser = CommandParser(
        "llava chat", "Chat about an image in the terminal. An empty line or Ctrl-D ends the chat."
    )
    parser.add_argument("image", help="Image to chat about")
    add_checkpoint_options(parser)
    # The answer is printed while it is generated, which beam search does not support.
    add_generation_options(parser, temperature=0.0, beam_search=False)
    return parser


def _add_job_options(parser: CommandParser) -> None:
    """Add the options that `llava caption` and `llava predict` share."""
    add_image_folder_option(parser)
    parser.add_argument(
        "--instruction",
        "--prompt",
        dest="instructions",
        action="append",
        default=[],
        help="Instruction or question about each image; repeat the option for several. Not for records, "
        "which contain their own instructions (default: the instruction of the training data)",
    )
    add_limit_option(parser, "records")
    add_batch_size_option(parser)
    slices = parser.add_argument_group(
        "slices",
        "Distribute the records over several processes or machines. With torchrun, no option is needed.",
    )
    add_shards_option(slices)
    slices.add_argument(
        "--num-chunks", type=int, help="Number of slices (LLaVA's form of --shards)"
    )
    slices.add_argument(
        "--chunk-idx", type=int, help="Index of the slice, from 0 (LLaVA's form of --shards)"
    )


# ---- commands ----


def caption_main(argv: list[str] | None = None) -> int:
    """Run `llava caption`; see `cli.main` for the exit status."""
    parser = build_caption_parser()
    args = parser.parse_args(argv)
    _check_numbers(args)
    _check_not_empty(args)
    options = replace(
        _generation_options(args, args.trials),
        start_with=args.start_with.strip(),
        forbid=_read_forbidden(args.forbid),
    )
    style = _caption_style(args, parse_endpoint_options(parser, args))
    if style.endpoint is not None:
        require_extra("download", "aiohttp", purpose="--endpoint")
        # Check the options before the images are listed, which can take minutes.
        request_fields(options, style.endpoint)
        style.endpoint.api_key()
    # Print the caption of a single image, unless an option says where to write it.
    prints = not args.output and not args.write and not args.review
    if prints and len(args.sources) == 1 and _is_image(args.sources[0]):
        if style.endpoint is not None:
            return _print_captions_of_endpoint(args, options, style, style.endpoint)
        return _caption_on_terminal(args, args.sources[0], options, style)
    if args.write:
        # The journal is in the folder of the sidecar files. Without --output this is the folder of the images, which
        # is found later, so pass only the name (see `runner.CaptionJob.output`).
        output = Path(SIDECAR_JOURNAL)
        if args.output:
            output = Path(args.output).absolute() / SIDECAR_JOURNAL
    else:
        output = Path(args.output or "captions.jsonl")
    # Accept .jsonl only: a folder may have millions of images, and the JSON array of `llava predict` would exist only
    # when all of them are captioned.
    if output.suffix != ".jsonl":
        raise ValueError(f"--output {output}: the file name must end in .jsonl")
    if args.engine == "ray":
        return _caption_on_cluster(args, output, options, style)
    return _run_slice(args, args.sources, output, options, style)


def predict_main(argv: list[str] | None = None) -> int:
    """Run `llava predict`; see `cli.main` for the exit status."""
    args = build_predict_parser().parse_args(argv)
    _check_numbers(args)
    trials = args.trials
    if trials is None:
        # LLaVA's tutorial samples three captions per image. With greedy decoding, all would be the same.
        trials = 1 if args.temperature == 0 or args.image is not None else 3
    options = _generation_options(args, trials)
    if args.image is not None:
        if args.output is not None:
            raise ValueError(
                f"--output {args.output}: the caption of --image is printed. Remove --output, or pass records with --data-path."
            )
        return _caption_on_terminal(args, args.image, options)
    output = "predictions.json" if args.output is None else args.output
    return _run_slice(args, [args.data_path], Path(output), options)


def chat_main(argv: list[str] | None = None) -> int:
    """Run `llava chat`: read questions from standard input, and print the answers as they are generated."""
    args = build_chat_parser().parse_args(argv)
    options = asdict(_generation_options(args, 1))

    from llava_simplified.captioning.runner import load_model
    from llava_simplified.data.images import load_pixels

    pixels = load_pixels(args.image)
    model = load_model(args)
    turns: list[Message] = []
    while True:
        question = _read_line("> ")
        if not question:
            return 0
        turns.append(Message("user", question))
        pieces = []
        # Pass the entire conversation every time, because the model has no memory between calls.
        for piece in model.stream(turns, [pixels], **options):
            print_text(piece, end="")
            pieces.append(piece)
        print_text("")
        # Replace an empty answer, because chat templates do not support empty turns.
        answer = "".join(pieces).strip() or "."
        turns.append(Message("assistant", answer))


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError if a number of `llava caption` or `llava predict` is below 1."""
    check_at_least(
        1,
        trials=args.trials,
        limit=args.limit,
        batch_size=args.batch_size,
        num_chunks=args.num_chunks,
    )


def _check_not_empty(args: argparse.Namespace) -> None:
    """Raise ValueError if an option of `llava caption` with a path is empty, as it is if a shell variable is not set.

    Such an option would be ignored, and files could be replaced at a place that the user does not expect.
    """
    for option in ("output", "review", "prompt_file"):
        if getattr(args, option) == "":
            raise ValueError(
                f"--{option.replace('_', '-')}: the path is empty. If it comes from a shell variable, set this variable."
            )


def _read_line(prompt: str) -> str:
    """Read a line from standard input. The prompt is printed on a terminal only."""
    if sys.stdin.isatty():
        print_text(prompt, end="")
    return sys.stdin.readline().strip()


def _generation_options(args: argparse.Namespace, num_return_sequences: int) -> GenerationOptions:
    """Return the generation options of a command line."""
    from llava_simplified.model.generation_options import GenerationOptions

    return GenerationOptions(
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.min_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        num_beams=args.num_beams,
        length_penalty=args.length_penalty,
        num_return_sequences=num_return_sequences,
        seed=args.seed,
    )


def _is_image(source: str) -> bool:
    """Return whether a source is a single image file, judging by its suffix."""
    # Import this here, because the module imports numpy and Pillow.
    from llava_simplified.captioning.inputs import IMAGE_SUFFIXES

    path = Path(source)
    return path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES


# ---- prompts and texts ----


@dataclass(frozen=True)
class CaptionStyle:
    """The options that `llava caption` has and `llava predict` does not have; see `runner.CaptionJob`."""

    prompts: tuple[WeightedPrompt, ...] = ()
    text: TextOptions = field(default_factory=TextOptions)
    sidecars: SidecarOptions | None = None
    review: str | None = None
    endpoint: EndpointOptions | None = None


def _caption_style(args: argparse.Namespace, endpoint: EndpointOptions | None) -> CaptionStyle:
    """Check the options that only `llava caption` has, and return them.

    Raises:
        ValueError: An option has a wrong value, or contradicts another one.
    """
    prompts: tuple[WeightedPrompt, ...] = ()
    # A prompt file contains several instructions, one of which is chosen for each image.
    if args.prompt_file:
        if args.instructions:
            raise ValueError("--prompt-file replaces --instruction; pass only one of them.")
        prompts = read_prompt_file(args.prompt_file)
    loop_guard = args.loop_guard
    if loop_guard is None:
        loop_guard = DEFAULT_LOOP_GUARD if args.write else 0
    text = TextOptions(
        prefix=args.prefix,
        suffix=args.suffix,
        template=args.template,
        max_words=args.max_words,
        loop_guard=loop_guard,
    )
    sidecars = _sidecar_options(args)
    if sidecars is not None:
        _check_tags(sidecars, text, prompts)
    return CaptionStyle(prompts, text, sidecars, args.review, endpoint)


def _sidecar_options(args: argparse.Namespace) -> SidecarOptions | None:
    """Return where and how sidecar files are written; None without `--write`."""
    if not args.write:
        for option in ("existing", "separator"):
            if getattr(args, option) is not None:
                raise ValueError(
                    f"--{option}: this option applies to sidecar files; add --write txt or --write caption."
                )
        return None
    # A sidecar file contains one caption.
    if args.trials > 1:
        raise ValueError(
            f"--trials {args.trials}: a sidecar file (--write) contains one caption; pass --trials 1."
        )
    if len(args.instructions) > 1:
        raise ValueError(
            "--instruction: a sidecar file (--write) contains one caption. Pass one instruction, or a "
            "--prompt-file from which one is chosen for each image."
        )
    if args.separator is not None and args.existing not in ("append", "prepend"):
        raise ValueError(
            "--separator: this option requires --existing append or --existing prepend."
        )
    if args.output and Path(args.output).suffix in (".json", ".jsonl"):
        raise ValueError(
            f"--output {args.output}: with --write, pass a folder for the caption files instead of a file."
        )
    separator = ", "
    if args.separator is not None:
        # Shells pass "\n" as two characters.
        separator = args.separator.replace("\\n", "\n")
    return SidecarOptions(
        suffix=f".{args.write}",
        existing=args.existing or "skip",
        output=str(Path(args.output).absolute()) if args.output else None,
        separator=separator,
    )


def _check_tags(
    sidecars: SidecarOptions, text: TextOptions, prompts: Sequence[WeightedPrompt]
) -> None:
    """Check the use of {tags} if captions are written to the same .txt files that the tags are read from.

    Raises:
        ValueError: The tags would always be empty, or would be written twice.
    """
    writes_tags = "tags" in field_names(text.template)
    replaces_tags = sidecars.suffix == TAGS_SUFFIX and sidecars.output is None
    if not replaces_tags:
        return
    if sidecars.existing == "skip" and (writes_tags or prompts_use_tags(prompts)):
        raise ValueError(
            "{tags} are read from the .txt files beside the images, and images with such a file are "
            "skipped. Pass --existing overwrite, or write elsewhere with --output or --write caption."
        )
    if writes_tags and sidecars.existing in ("append", "prepend"):
        raise ValueError(
            f"--template with {{tags}} and --existing {sidecars.existing} would write the existing text "
            "twice. Pass --existing overwrite."
        )


def _read_forbidden(path: str | None) -> tuple[str, ...]:
    """Return the words and phrases in the `--forbid` file, one per line."""
    if path is None:
        return ()
    phrases = [line.strip() for line in read_text_lines(path, "--forbid") if line.strip()]
    if not phrases:
        raise ValueError(f"--forbid {path}: the file contains no words")
    return tuple(dict.fromkeys(phrases))


# ---- one image ----


def _caption_on_terminal(
    args: argparse.Namespace,
    image: str,
    options: GenerationOptions,
    style: CaptionStyle = CaptionStyle(),
) -> int:
    """Print the captions of one image; as they are generated, if generated text cannot change afterward."""
    from llava_simplified.captioning.inputs import refuse_image_folder
    from llava_simplified.captioning.runner import load_model
    from llava_simplified.data.images import load_pixels

    refuse_image_folder(args.image_folder, image)
    pixels = load_pixels(image)  # load it before the model, so that a wrong path fails immediately
    model = load_model(args)
    generation: dict[str, Any] = asdict(replace(options, loop_guard=style.text.loop_guard))
    count = generation.pop("num_return_sequences")
    instructions = args.instructions or [model.instruction]
    folder = str(Path(image).parent.absolute())
    name = Path(image).name
    if style.prompts:
        instructions = [prompt_chooser(style.prompts, folder, options.seed or 0)(name)]
    # The caption is printed, so there are no sidecar files.
    finisher = CaptionFinisher(style.text, sidecars=None, image_folder=folder)
    for instruction in instructions:
        # Print while the model generates only if the text cannot change afterward: beam search and text options
        # determine it at the end, and several captions would be mixed on the screen.
        if count == 1 and options.num_beams == 1 and style.text == TextOptions():
            for piece in model.stream(instruction, [pixels], **generation):
                print_text(piece, end="")
            print_text("")
        else:
            captions = model.caption(
                [pixels], instruction, num_return_sequences=count, **generation
            )[0]
            # `caption` returns a string if one caption was requested, otherwise a list.
            if count == 1:
                captions = [captions]
            for caption in captions:
                print_text(finisher.finish_text(name, caption).text)
    return 0


def _print_captions_of_endpoint(
    args: argparse.Namespace,
    options: GenerationOptions,
    style: CaptionStyle,
    endpoint: EndpointOptions,
) -> int:
    """Print the captions of one image, generated by a server. The exit status is 1 if a caption is missing."""
    from llava_simplified.captioning.endpoint_captions import caption_at_endpoint
    from llava_simplified.captioning.inputs import open_inputs
    from llava_simplified.model.config import DEFAULT_INSTRUCTION

    image = Path(args.sources[0])
    instructions = args.instructions or [DEFAULT_INSTRUCTION]
    if style.prompts:
        chooser = prompt_chooser(style.prompts, str(image.parent.absolute()), options.seed or 0)
        instructions = [chooser(image.name)]
    records, folder = open_inputs(args.sources, args.image_folder, instructions)
    finisher = CaptionFinisher(style.text, sidecars=None, image_folder=folder)
    status = 0
    indices = range(len(records))  # one record for each instruction
    for rows, failed_rows in caption_at_endpoint(records, folder, options, endpoint, indices):
        for row in rows:
            print_text(finisher.finish_text(image.name, row["pred_output"]).text)
        for row in failed_rows:
            logger.error("%s", row["error"])
            status = 1
    return status


# ---- many images ----


def parse_job_slice(args: argparse.Namespace) -> tuple[int, int]:
    """Return (index, count) of the slice of the records to caption. The index counts from 0.

    The slice is given by `--shards i/n`, by LLaVA's `--num-chunks n --chunk-idx i`, or by torchrun's
    environment variables.

    Raises:
        ValueError: The options contradict each other, or the index is not less than the count.
    """
    if args.shards:
        if args.num_chunks is not None or args.chunk_idx is not None:
            raise ValueError(
                "--shards replaces --num-chunks and --chunk-idx; pass either --shards or the other two."
            )
        parse_slice(args.shards, total=0)  # raises ValueError if the format is wrong
        index, _, count = args.shards.partition("/")
        return int(index), int(count)
    # By default, use one slice per torchrun process: torchrun sets WORLD_SIZE and RANK.
    num_slices = args.num_chunks
    if num_slices is None:
        num_slices = int(os.environ.get("WORLD_SIZE", "1"))
    slice_index = args.chunk_idx
    if slice_index is None:
        slice_index = int(os.environ.get("RANK", "0"))
    if not 0 <= slice_index < num_slices:
        raise ValueError(
            f"--chunk-idx {slice_index} (default: RANK) must be at least 0 and less than --num-chunks {num_slices} "
            "(default: WORLD_SIZE)."
        )
    return slice_index, num_slices


def _run_slice(
    args: argparse.Namespace,
    sources: list[str],
    output: Path,
    options: GenerationOptions,
    style: CaptionStyle = CaptionStyle(),
) -> int:
    """Caption one slice of the source in this process, and return the exit status."""
    from llava_simplified.captioning.runner import caption_file

    slice_index, num_slices = parse_job_slice(args)
    # With a server, this process needs no GPU. It must not import torch, because torch may not be installed.
    if style.endpoint is None:
        _select_gpu()
    job = _make_job(args, sources, output, options, style, slice_index, num_slices)
    return _report(caption_file(job), job)


def _select_gpu() -> None:
    """Use one GPU per torchrun process; otherwise all would use cuda:0."""
    import torch

    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def _caption_on_cluster(
    args: argparse.Namespace, output: Path, options: GenerationOptions, style: CaptionStyle
) -> int:
    """Caption all `--num-chunks` slices of the source as Ray tasks, and return the exit status."""
    from llava_simplified.captioning.runner import caption_file

    # Reject the options that select one slice: with Ray, this process starts all slices.
    if args.shards or args.chunk_idx is not None:
        raise ValueError(
            "--engine ray captions all slices. Pass --num-chunks N, and remove --shards and --chunk-idx."
        )
    num_slices = args.num_chunks or 1
    jobs = []
    for slice_index in range(num_slices):
        job = _make_job(args, args.sources, output, options, style, slice_index, num_slices)
        jobs.append(_with_absolute_paths(job))
    failed = False
    for task in run_tasks(caption_file, jobs, engine="ray"):
        if task.result is None:
            # Let the other slices continue. When the command is run again, it finishes the slice that failed.
            failed = True
            logger.error("%s: %s", task.spec.output, task.error)
        else:
            failed |= bool(_report(task.result, task.spec))
    return 1 if failed else 0


def _with_absolute_paths(job: CaptionJob) -> CaptionJob:
    """Return a job that does not depend on the working directory. A Ray worker has a different one."""
    sources = [job.source] if isinstance(job.source, str) else job.source
    absolute_sources = tuple(str(Path(source).absolute()) for source in sources)
    # With sidecar files, a file name as the output means the folder of the images; see `runner.CaptionJob.output`.
    output = job.output if job.sidecars else str(Path(job.output).absolute())
    # Checkpoints may also be names of repositories on the hub, which `resolve_path` does not change.
    return replace(
        job,
        source=absolute_sources[0] if len(absolute_sources) == 1 else absolute_sources,
        output=output,
        review=str(Path(job.review).absolute()) if job.review else None,
        image_folder=str(Path(job.image_folder).absolute()) if job.image_folder else None,
        model_path=resolve_path(job.model_path) if job.model_path else "",
        model_base=resolve_path(job.model_base) if job.model_base else None,
        vision_tower=resolve_path(job.vision_tower) if job.vision_tower else None,
    )


def _make_job(
    args: argparse.Namespace,
    sources: list[str],
    output: Path,
    options: GenerationOptions,
    style: CaptionStyle,
    slice_index: int,
    num_slices: int,
) -> CaptionJob:
    """Return the job of one slice, which has its own output, such as `captions-0-of-4.jsonl`."""
    from llava_simplified.captioning.runner import CaptionJob

    review = Path(style.review) if style.review else None
    # Use one file per slice, because processes on several machines cannot append to the same file.
    if num_slices > 1:
        name_of_slice = f"-{slice_index}-of-{num_slices}"
        output = output.with_name(f"{output.stem}{name_of_slice}{output.suffix}")
        if review:
            review = review.with_name(f"{review.stem}{name_of_slice}{review.suffix}")
    return CaptionJob(
        **checkpoint_options(args),
        # Store a single source as a string, like version 0.1.0, so that its unfinished jobs can continue.
        source=sources[0] if len(sources) == 1 else tuple(sources),
        output=str(output),
        options=options,
        instructions=tuple(args.instructions),
        image_folder=args.image_folder,
        limit=args.limit,
        batch_size=args.batch_size,
        chunk=slice_index,
        chunks=num_slices,
        prompts=style.prompts,
        text=style.text,
        sidecars=style.sidecars,
        review=str(review) if review else None,
        endpoint=style.endpoint,
    )


def _report(counts: CaptionCounts, job: CaptionJob) -> int:
    """Log the result of a job, and return the exit status: 1 if records failed and none was captioned, else 0."""
    output = job.output
    if job.sidecars is None:
        logger.info("Captioned %s records into %s.", f"{counts.captioned:,}", output)
    # With sidecar files, the list of failures is in their folder, and `caption_file` has already logged its path.
    if counts.failed and job.sidecars is None:
        logger.warning(
            "Records that cannot be captioned: %s. They are listed with reasons in %s.bad.jsonl.",
            f"{counts.failed:,}",
            output,
        )
    return 1 if counts.failed and not counts.captioned else 0
