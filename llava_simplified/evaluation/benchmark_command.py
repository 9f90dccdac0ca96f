"""`llava benchmark`: caption a published benchmark with the usual settings, score the captions, write a report.

Files in the output folder:

    records.jsonl                the images, with the instruction and the references
    greedy.jsonl, beam.jsonl     captions; an interrupted job continues, see `captioning/runner.py`
    scores.json                  settings, scores with intervals, scores by domain, and a comparison of both decodings
    report.html                  the contents of scores.json as a page, with images and captions
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_simplified.captioning.endpoint_options import (
    EndpointOptions,
    add_endpoint_options,
    parse_endpoint_options,
)
from llava_simplified.evaluation.evaluate_command import (
    add_scoring_options,
    check_scoring_options,
    comparison_to_json,
    format_table,
    replace_surrogates,
    to_json,
)
from llava_simplified.extras import require_extra
from llava_simplified.model.config import DEFAULT_INSTRUCTION, read_checkpoint_config
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.options import (
    CommandParser,
    add_batch_size_option,
    add_checkpoint_options,
    add_limit_option,
    check_at_least,
    checkpoint_options,
    print_text,
)

if TYPE_CHECKING:
    from llava_simplified.captioning.runner import CaptionJob
    from llava_simplified.evaluation.benchmark_sets import BenchmarkImage, BenchmarkSet
    from llava_simplified.evaluation.comparison import Comparison
    from llava_simplified.evaluation.evaluation_report import Run
    from llava_simplified.evaluation.metrics import Evaluation, Sample
    from llava_simplified.evaluation.references import References
    from llava_simplified.model.llava import Llava

logger = logging.getLogger(__name__)

BENCHMARK_NAMES = ("coco", "nocaps", "flickr30k", "textcaps")

# Greedy search uses the settings of lmms-eval's captioning tasks (temperature 0, 64 tokens), and beam search those of
# the BLIP-2 paper (5 beams, 30 tokens, length penalty 1), so that scores can be compared with published ones.
DECODINGS = {
    "greedy": GenerationOptions(max_new_tokens=64, seed=0),
    "beam": GenerationOptions(max_new_tokens=30, num_beams=5, seed=0),
}


def build_parser() -> CommandParser:
    """Return the parser of `llava benchmark`."""
    parser = CommandParser(
        "llava benchmark", "Caption a published benchmark, and score the captions."
    )
    parser.add_argument("name", choices=BENCHMARK_NAMES, help="Name of the benchmark")
    parser.add_argument(
        "folder",
        type=Path,
        metavar="path",
        help="Folder with the published files and images of the benchmark",
    )
    parser.add_argument(
        "--split",
        help="Split of the benchmark (default: the one that papers report: Karpathy's test split of coco "
        "and flickr30k, val of nocaps and textcaps)",
    )
    parser.add_argument(
        "--decoding",
        action="append",
        choices=list(DECODINGS),
        help="Decoding method of the captions; repeat the option to use both (default: both; greedy with --endpoint)",
    )
    parser.add_argument(
        "--instruction",
        help="Instruction for every image (default: the instruction of the checkpoint)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="Output folder; an unfinished benchmark in it is continued (default: benchmarks/NAME-SPLIT)",
    )
    add_limit_option(parser, "images")
    add_checkpoint_options(parser, required=False)
    add_batch_size_option(parser)
    add_scoring_options(parser)
    add_endpoint_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `llava benchmark`.

    Returns:
        The exit status: 1 if an image has no caption, because the scores then cover only a part of the benchmark;
        otherwise 0.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    check_at_least(1, limit=args.limit, batch_size=args.batch_size)
    check_scoring_options(args)
    endpoint = parse_endpoint_options(parser, args)
    decodings = _choose_decodings(args.decoding, endpoint)
    # Reading a benchmark can take minutes, so check the options of the endpoint first.
    if endpoint is not None:
        require_extra("download", "aiohttp", purpose="--endpoint")
        endpoint.api_key()
    instruction = _choose_instruction(args, endpoint)

    # Import these only now, so that `--help` does not wait for numpy.
    from llava_simplified.evaluation.benchmark_sets import read_benchmark

    benchmark = read_benchmark(args.name, args.folder, args.split)
    images = benchmark.images[: args.limit]
    output = args.output or Path("benchmarks") / f"{benchmark.name}-{benchmark.split}"
    output.mkdir(parents=True, exist_ok=True)
    # Caption a file of records with the job of `llava caption`: it resumes after an interruption, and it does not
    # continue a file that was written with different settings.
    records = output / "records.jsonl"
    _write_records(records, images, instruction)
    settings = _describe_settings(args, benchmark, len(images), instruction)

    # Finished captions are not generated again. Scores are always computed anew, which takes little time.
    num_failed = _caption_all(args, decodings, records, output, endpoint)
    runs = _score_all(args, decodings, output, benchmark)
    _add_notes(runs, benchmark, len(images))
    groups = _score_domains(args, runs, benchmark)
    _write_results(args, output, runs, groups, settings, benchmark)
    if num_failed:
        logger.warning(
            "Images without a caption: %d. The scores cover only a part of the benchmark. The reasons are in %s.",
            num_failed,
            output / "*.bad.jsonl",
        )
    return 1 if num_failed else 0


def _choose_decodings(chosen: Sequence[str] | None, endpoint: EndpointOptions | None) -> list[str]:
    """Return the decodings, in the order of `DECODINGS`."""
    if endpoint is None:
        wanted = set(chosen or DECODINGS)
    else:
        wanted = set(chosen or ["greedy"])
        if "beam" in wanted:
            raise ValueError(
                "--decoding beam: OpenAI's API has no beam search. With --endpoint, pass --decoding greedy or leave "
                "the option out."
            )
    return [name for name in DECODINGS if name in wanted]


def _choose_instruction(args: argparse.Namespace, endpoint: EndpointOptions | None) -> str:
    """Return the instruction for every image.

    Without `--instruction`, this is the instruction that the checkpoint was trained with. For the model of an endpoint,
    that instruction is not known, so the default instruction is used.
    """
    if args.instruction is not None:
        return str(args.instruction)
    if endpoint is not None:
        return DEFAULT_INSTRUCTION
    # Read it from llava.json, because the records are written before the model is loaded.
    architecture = read_checkpoint_config(Path(args.model_path))["architecture"]
    return str(architecture.get("instruction", DEFAULT_INSTRUCTION))


def _write_records(path: Path, images: Sequence[BenchmarkImage], instruction: str) -> None:
    """Write the records of the images, unless the file contains the same records already.

    Writing the same text again would change the modification time of the file. This time is one of the settings of the
    captioning job, which continues only if its settings are unchanged.

    Raises:
        ValueError: The folder contains captions of other records. Nothing was written, so that the command that they
            belong to can still continue.
    """
    lines = []
    for image in images:
        row = {
            "image": image.image,
            "instruction": instruction,
            "responses": list(image.references),
        }
        lines.append(json.dumps(row) + "\n")
    text = "".join(lines)
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return
        for name in DECODINGS:
            captions = path.with_name(f"{name}.jsonl")
            if captions.exists():
                raise ValueError(
                    f"{captions}: these captions were generated for other images or with another instruction, which "
                    f"are in {path.name}. Pass the same --split, --limit and --instruction again, or another --output."
                )
    path.write_text(text, encoding="utf-8")


def _describe_settings(
    args: argparse.Namespace, benchmark: BenchmarkSet, num_images: int, instruction: str
) -> dict[str, str]:
    """Return the settings that the report shows."""
    settings = {
        "benchmark": f"{benchmark.name}, split {benchmark.split}",
        "references": str(benchmark.source),
        "images": f"{num_images} of {len(benchmark.images)}",
        "model": args.model_path or f"{args.model} at {args.endpoint}",
        "instruction": instruction,
        "bootstrap": f"{args.resamples} resamples, seed {args.seed}",
    }
    for name, options in DECODINGS.items():
        settings[name] = f"{options.num_beams} beams, at most {options.max_new_tokens} tokens"
    return settings


# ---- captions ----


def _caption_all(
    args: argparse.Namespace,
    decodings: Sequence[str],
    records: Path,
    output: Path,
    endpoint: EndpointOptions | None,
) -> int:
    """Caption the images with each decoding; unfinished files are continued.

    Returns:
        The number of images without a caption; if the decodings differ, the larger number.
    """
    from llava_simplified.captioning.runner import CaptionJob, caption_file, load_model

    model: Llava | None = None
    most_failed = 0
    for name in decodings:
        job: CaptionJob = CaptionJob(
            **checkpoint_options(args),
            source=str(records),
            output=str(output / f"{name}.jsonl"),
            options=DECODINGS[name],
            image_folder=str(args.folder),
            batch_size=args.batch_size,
            endpoint=endpoint,
        )
        # Load the model once, for both decodings.
        if endpoint is None and model is None:
            model = load_model(job)
        counts = caption_file(job, model)
        if not counts.captioned:
            raise ValueError(
                f"--decoding {name}: none of the {counts.failed} images could be captioned; the reasons are in "
                f"{job.output}.bad.jsonl."
            )
        logger.info("%s: %d images captioned", name, counts.captioned)
        most_failed = max(most_failed, counts.failed)
    return most_failed


# ---- scores ----


def _score_all(
    args: argparse.Namespace, decodings: Sequence[str], output: Path, benchmark: BenchmarkSet
) -> list[Run]:
    """Score the captions of each decoding, on the images that all of them have captions for."""
    from llava_simplified.evaluation.chair import read_instances
    from llava_simplified.evaluation.evaluation_report import Run
    from llava_simplified.evaluation.predictions import read_predictions

    # Read the annotations once for all decodings, because COCO's files have a size of hundreds of megabytes.
    instances = read_instances(benchmark.instances) if benchmark.instances else None
    samples_by_decoding: dict[str, list[Sample]] = {}
    captioned: list[set[str]] = []
    for name in decodings:
        samples = read_predictions(output / f"{name}.jsonl").samples
        samples_by_decoding[name] = samples
        captioned.append({sample.image for sample in samples})
    # An image can have a caption of one decoding and none of the other. Leave it out of both, because scores on
    # different images cannot be compared.
    captioned_by_all = set.intersection(*captioned)
    runs = []
    for name, samples in samples_by_decoding.items():
        kept = [sample for sample in samples if sample.image in captioned_by_all]
        runs.append(Run(name, kept, _score(args, kept, instances)))
    return runs


def _score(
    args: argparse.Namespace, samples: Sequence[Sample], instances: References | None = None
) -> Evaluation:
    """Score samples. `instances` are the annotated objects of the images, for CHAIR; with None, CHAIR is skipped."""
    from llava_simplified.evaluation.chair import annotated_objects
    from llava_simplified.evaluation.metrics import evaluate
    from llava_simplified.evaluation.predictions import read_sample_images

    annotated = None
    if instances is not None:
        annotated = annotated_objects([sample.image for sample in samples], instances)
    return evaluate(
        samples,
        clip=args.clip,
        images=read_sample_images(samples, args.folder) if args.clip else (),
        annotated=annotated,
        java=not args.no_java,
        resamples=args.resamples,
        seed=args.seed,
    )


def _add_notes(runs: Sequence[Run], benchmark: BenchmarkSet, num_images: int) -> None:
    """Insert notes on missing images before the other notes of each run."""
    # Begin with the images that are missing from the folder, because they explain why captions are missing.
    notes = list(benchmark.notes)
    if num_images < len(benchmark.images):
        notes.append(f"--limit: only the first {num_images} of {len(benchmark.images)} images")
    for run in runs:
        own_notes = list(notes)
        if len(run.samples) < num_images:
            missing = num_images - len(run.samples)
            own_notes.append(f"{missing} of {num_images} images have no caption and no score")
        run.result.notes[:0] = own_notes


def _score_domains(
    args: argparse.Namespace, runs: Sequence[Run], benchmark: BenchmarkSet
) -> dict[str, dict[str, Evaluation]]:
    """Return the scores by run and domain.

    Each domain is scored separately: CIDEr's document frequencies are counted in the references of the domain only.
    """
    from llava_simplified.evaluation.benchmark_sets import images_by_domain

    groups: dict[str, dict[str, Evaluation]] = {}
    for run in runs:
        for domain, names in images_by_domain(benchmark.images).items():
            samples = [sample for sample in run.samples if sample.image in names]
            if samples:  # with --limit, a domain may have no images
                groups.setdefault(run.name, {})[domain] = _score(args, samples)
    return groups


# ---- output ----


def _write_results(
    args: argparse.Namespace,
    output: Path,
    runs: Sequence[Run],
    groups: Mapping[str, Mapping[str, Evaluation]],
    settings: Mapping[str, str],
    benchmark: BenchmarkSet,
) -> None:
    """Print the scores, and write scores.json and report.html."""
    from llava_simplified.evaluation.comparison import compare_runs
    from llava_simplified.evaluation.evaluation_report import write_report

    comparisons: dict[str, Comparison] = {}
    scores: dict[str, Any] = {}
    for run in runs:
        print_text(f"{run.name}: {format_table(run.result)}")
        scores[run.name] = to_json(run.result)
        scores[run.name]["decoding"] = asdict(DECODINGS[run.name])
        # Only nocaps has domains.
        domains = groups.get(run.name, {})
        for domain, result in domains.items():
            print_text(f"{run.name}, {domain}: {format_table(result)}")
        scores[run.name]["domains"] = {name: to_json(domains[name]) for name in domains}
    # Compare every other decoding with the first one.
    for run in runs[1:]:
        first = runs[0]
        comparison = compare_runs(first.samples, first.result, run.samples, run.result)
        comparisons[run.name] = comparison
        scores[run.name]["compared with"] = comparison_to_json(first, comparison)

    # Do not escape characters of other languages, so that people can read the file.
    content = {"settings": dict(settings), "runs": scores}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (output / "scores.json").write_text(replace_surrogates(text), encoding="utf-8")
    write_report(
        output / "report.html",
        title=f"{benchmark.name}: {settings['model']}",
        runs=runs,
        comparisons=comparisons,
        image_folder=args.folder,
        settings=settings,
        groups=groups,
    )
    logger.info("Scores and report written to %s", output)
