"""The Python functions `llava_simplified.train` and `llava_simplified.evaluate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_simplified.evaluation.metrics import Evaluation, Sample


def train(config: str | Path | None = None, **options: Any) -> Path:
    """Train a model, as `llava train` does.

        train(
            model_name_or_path="mistralai/Mistral-7B-Instruct-v0.1",
            vision_tower="openai/clip-vit-base-patch16",
            train_data_path="data/train.json",
            output_dir="output/captioner",
            lora_r=8,
        )

    Args:
        config: A YAML file with options.
        options: Options of `llava train` by name. They take precedence over the file. An option with the value
            None counts as not given.

    Returns:
        The folder of the trained model, for `Llava.from_pretrained`.

    Raises:
        ValueError: An option does not exist or has an invalid value, or the data is not valid.
    """
    # Import these here, because they import transformers, which takes seconds.
    from llava_simplified.arguments import parse_arguments, to_argv
    from llava_simplified.training import train_command
    from llava_simplified.training.preflight import preflight

    # Convert the options to a command line, so that they are parsed and checked as by `llava train`.
    argv = to_argv({"config": config, **options})
    arguments = parse_arguments(argv)
    preflight(argv, *arguments)
    return train_command.train(*arguments)


def evaluate(
    predictions: str | Path | Sequence[Sample],
    references: str | Path | Mapping[str, Sequence[str]] | None = None,
    *,
    train_captions: str | Path | Iterable[str] | None = None,
    instances: Sequence[str | Path] = (),
    clip: str | Path | None = None,
    image_folder: str | Path = "",
    java: bool = True,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Score predictions, as `llava evaluate` does.

        scores = evaluate("predictions.json").mean
        print(scores["CIDEr-D"].value)

    Args:
        predictions: A prediction file of `llava predict` or `llava caption`, or samples.
        references: A COCO caption file, or captions by image name. They replace the reference captions in the
            prediction file.
        train_captions: The training records, or their captions. If given, two more scores are computed: the share
            of generated captions, and of references, that do not occur in the training data.
        instances: Files of COCO instance annotations. If given, CHAIR is computed.
        clip: Folder of a CLIP model. If given, CLIPScore is computed, which requires the images.
        image_folder: Image folder, for CLIPScore.
        java: Compute METEOR and SPICE as well, if Java and pycocoevalcap are installed.
        resamples: Number of bootstrap resamples for the intervals; 0 for none.
        seed: Random seed of the bootstrap.

    Returns:
        The scores: `.mean` over the captions of an image, `.best`, `.per_image`, and more.

    Raises:
        ValueError: The predictions cannot be read, or do not belong to the references.
    """
    from llava_simplified.evaluation import metrics
    from llava_simplified.evaluation.chair import annotated_objects, read_instances
    from llava_simplified.evaluation.predictions import (
        Predictions,
        read_predictions,
        read_sample_images,
        read_train_captions,
    )
    from llava_simplified.evaluation.references import References, read_references

    captions_by_image: References | None = None
    if isinstance(references, (str, Path)):
        captions_by_image = read_references(Path(references))
    elif references is not None:
        # Pass the captions twice, because a key may be the name of an image or, like COCO's ids, the name without its
        # suffix.
        captions_by_image = References(references, by_id=references)
    if isinstance(train_captions, (str, Path)):
        train_captions = read_train_captions(Path(train_captions))
    if isinstance(predictions, (str, Path)):
        read = read_predictions(Path(predictions), captions_by_image)
    elif references is not None:
        raise ValueError(
            "references can only be passed with a prediction file. Samples contain their own references."
        )
    else:
        read = Predictions(list(predictions))
    # Read the images only for CLIPScore. Without it, the folder need not exist.
    images: list[bytes] = []
    if clip is not None:
        images = read_sample_images(read.samples, Path(image_folder))
    annotated = None
    if instances:
        names = [sample.image for sample in read.samples]
        annotated = annotated_objects(names, read_instances(list(map(Path, instances))))
    result = metrics.evaluate(
        read.samples,
        train_captions=train_captions,
        clip=None if clip is None else Path(clip),
        images=images,
        annotated=annotated,
        java=java,
        resamples=resamples,
        seed=seed,
    )
    result.notes[:0] = read.notes
    result.counts = read.counts
    return result
