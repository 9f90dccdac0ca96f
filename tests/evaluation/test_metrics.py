"""Tests of the metrics: scores equal those of the COCO server, and intervals those of a step-by-step bootstrap."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny import save_tiny_clip

from llava_simplified.evaluation.clip_metrics import clip_scores
from llava_simplified.evaluation.metrics import Sample, evaluate, word_f1
from llava_simplified.evaluation.ptb_tokenizer import tokenize

from .coco import make_samples, needs_java

BLEU_NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")


def make_sample(caption: str | tuple[str, ...], *references: str, index: int = 0) -> Sample:
    captions = caption if isinstance(caption, tuple) else (caption,)
    return Sample(str(index), f"{index}.jpg", "Describe.", references, captions)


def server_scores(samples: list[Sample], trial: int) -> dict[str, tuple[float, np.ndarray]]:
    """Return the scores of the corpus and of single captions from pycocoevalcap, on our tokens."""
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references = {}
    captions = {}
    for image, sample in enumerate(samples):
        references[image] = [tokenize(reference) for reference in sample.references]
        captions[image] = [tokenize(sample.captions[trial])]
    corpus, single = bleu.Bleu(4).compute_score(references, captions, verbose=0)
    scores = {name: (corpus[n], np.array(single[n])) for n, name in enumerate(BLEU_NAMES)}
    scores["CIDEr-D"] = Cider().compute_score(references, captions)
    scores["ROUGE-L"] = Rouge().compute_score(references, captions)
    return scores


# ---- scores of the COCO server ----


@pytest.mark.parametrize(
    ("num_images", "most_references", "seed"),
    [(80, 4, 0), (30, 1, 1), (1, 3, 2), (2, 2, 3)],
)
def test_evaluate_equals_pycocoevalcap(num_images: int, most_references: int, seed: int) -> None:
    samples = make_samples(num_images, trials=3, most_references=most_references, seed=seed)
    result = evaluate(samples, java=False, resamples=0)
    for trial in range(3):
        for name, (corpus, single) in server_scores(samples, trial).items():
            assert result.trials[trial][name].value == pytest.approx(corpus, abs=1e-9), name
            np.testing.assert_allclose(
                result.per_image[name][trial], single, atol=1e-9, err_msg=name
            )


def test_evaluate_returns_recorded_scores() -> None:
    """The server's scores of `make_samples(60)`, with the tokens of its Java tokenizer."""
    recorded = {
        "BLEU-1": 0.575257377,
        "BLEU-2": 0.505971838,
        "BLEU-3": 0.438481528,
        "BLEU-4": 0.38051306,
        "CIDEr-D": 2.491999697,
        "ROUGE-L": 0.533556369,
    }
    result = evaluate(make_samples(60), java=False, resamples=0)
    for name, value in recorded.items():
        assert result.mean[name].value == pytest.approx(value, abs=1e-6), name


@needs_java
@pytest.mark.slow
@pytest.mark.xdist_group("meteor")
@pytest.mark.usefixtures("one_meteor_process")
def test_evaluate_equals_the_server_live() -> None:
    """The expected scores come from the server's code alone, with Stanford's tokenizer and METEOR."""
    ptbtokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor import meteor as meteor_module
    from pycocoevalcap.rouge.rouge import Rouge

    samples = make_samples(60, trials=2)
    result = evaluate(samples, resamples=0)
    tokenizer = ptbtokenizer.PTBTokenizer()

    def tokenize_in_java(texts: list[tuple[str, ...]]) -> dict[int, list[str]]:
        groups = {i: [{"caption": text} for text in group] for i, group in enumerate(texts)}
        return tokenizer.tokenize(groups)

    # Tokenize all captions in one process, because starting Java takes longer than tokenizing.
    texts = [sample.references for sample in samples]
    for trial in range(len(result.trials)):
        texts += [(sample.captions[trial],) for sample in samples]
    tokens = list(tokenize_in_java(texts).values())
    references = dict(enumerate(tokens[: len(samples)]))
    meteor = meteor_module.Meteor()
    for trial, scores in enumerate(result.trials):
        start = (trial + 1) * len(samples)
        captions = dict(enumerate(tokens[start : start + len(samples)]))
        bleu, _ = Bleu(4).compute_score(references, captions, verbose=0)
        expected = dict(zip(BLEU_NAMES, bleu))
        for name, scorer in (("CIDEr-D", Cider()), ("ROUGE-L", Rouge()), ("METEOR", meteor)):
            expected[name], _ = scorer.compute_score(references, captions)
        for name, value in expected.items():
            assert scores[name].value == pytest.approx(value, abs=1e-6), name
    best_trial = max(scores["METEOR"].value for scores in result.trials)
    assert result.best["METEOR"].value > best_trial
    is_left_out = any("SPICE" in note for note in result.notes)
    assert is_left_out or "SPICE" in result.mean


def test_evaluate_notes_missing_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    result = evaluate(make_samples(60), resamples=0)
    assert "METEOR" not in result.mean
    (note,) = result.notes
    assert "METEOR" in note
    assert "SPICE" in note
    assert "java" in note
    assert "PATH" in note


def test_cider_equals_the_formula_of_the_paper() -> None:
    """Vedantam et al. 2015, equations 1 to 3, with natural logarithms and the customary factor 10."""
    samples = make_samples(25, seed=5)
    references = [[tokenize(text).split() for text in sample.references] for sample in samples]

    def count_ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
        return Counter(zip(*(words[start:] for start in range(n))))

    def document_frequency(n: int) -> Counter[tuple[str, ...]]:
        """Count the images with an n-gram in one of their references."""
        frequency: Counter[tuple[str, ...]] = Counter()
        for group in references:
            frequency.update(set().union(*(count_ngrams(words, n) for words in group)))
        return frequency

    frequencies = {n: document_frequency(n) for n in range(1, 5)}

    def vector(words: list[str], n: int) -> dict[tuple[str, ...], float]:
        weights = {}
        for ngram, count in count_ngrams(words, n).items():
            weights[ngram] = count * math.log(len(samples) / max(1, frequencies[n][ngram]))
        return weights

    expected = []
    for sample, group in zip(samples, references):
        total = 0.0
        for n in range(1, 5):
            ours = vector(tokenize(sample.captions[0]).split(), n)
            for reference in group:
                theirs = vector(reference, n)
                norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
                dot = sum(weight * theirs.get(ngram, 0) for ngram, weight in ours.items())
                if norms:
                    total += dot / norms / len(group) / 4
        expected.append(10 * total)
    result = evaluate(samples, java=False, resamples=0)
    np.testing.assert_allclose(result.per_image["CIDEr"][0], expected, atol=1e-9)


# ---- intervals ----


@pytest.mark.medium
def test_intervals_equal_a_bootstrap_done_step_by_step() -> None:
    samples = make_samples(40, trials=2)
    resamples = 25
    seed = 7
    result = evaluate(samples, java=False, resamples=resamples, seed=seed)
    draws = np.random.default_rng(seed).multinomial(40, [1 / 40] * 40, size=resamples)
    single = server_scores(samples, 1)
    bleu = []
    cider = []
    for draw in draws:
        chosen = np.repeat(np.arange(40), draw).tolist()
        resampled = [samples[image] for image in chosen]
        bleu.append(server_scores(resampled, 1)["BLEU-3"][0])
        cider.append(single["CIDEr-D"][1][chosen].mean())
    for name, values in (("BLEU-3", bleu), ("CIDEr-D", cider)):
        expected = np.percentile(values, [2.5, 97.5])
        np.testing.assert_allclose(result.trials[1][name][1:], expected, atol=1e-9, err_msg=name)


@pytest.mark.medium
def test_interval_of_a_mean_is_as_wide_as_its_standard_error_predicts() -> None:
    result = evaluate(make_samples(400), java=False, resamples=4000)
    standard_error = result.per_image["word F1"][0].std() / math.sqrt(400)
    score = result.mean["word F1"]
    assert (score.high - score.low) / 2 == pytest.approx(1.96 * standard_error, rel=0.06)


# ---- trials, simple metrics, and other checks ----


def test_evaluate_returns_mean_and_best_of_trials() -> None:
    samples = [
        make_sample(("a cat", "a dog", "x"), "a dog", index=0),
        make_sample(("the sea", "sky", "y"), "the sea", index=1),
    ]
    result = evaluate(samples, java=False)
    assert [scores["exact match"].value for scores in result.trials] == [0.5, 0.5, 0.0]
    assert result.mean["exact match"].value == pytest.approx(1 / 3)
    assert result.best["exact match"].value == 1
    assert result.best["BLEU-1"].value == pytest.approx(1)


def test_word_f1_compares_bags_of_words_with_the_best_reference() -> None:
    assert word_f1("A cat cat", ["a cat on it"]) == pytest.approx(2 * 2 / (3 + 4))
    assert word_f1("a cat", ["two dogs", "A  CAT"]) == 1
    assert word_f1("", ["a"]) == 0
    assert word_f1("x", ["a"]) == 0


def test_evaluate_counts_novel_distinct_and_unseen() -> None:
    samples = [
        make_sample("a cat", "a cat", index=0),  # memorized: equal to a training caption
        make_sample("A  Cat", "a dog", "the dog", index=1),  # one reference is a training caption
        make_sample("a fox", "a fox", index=2),
        make_sample("a bird", "a fish", index=3),
    ]
    train_captions = ["A cat", "the dog"]
    result = evaluate(samples, train_captions=train_captions, java=False, resamples=0)
    assert result.shares == {
        "distinct captions": 0.75,
        "novel captions": 0.5,
        "unseen references": 0.5,
    }
    assert result.unseen["exact match"].value == 0.5
    alone = evaluate(samples[2:], java=False, resamples=0)
    unseen = {name: score.value for name, score in result.unseen.items()}
    assert unseen == {name: score.value for name, score in alone.mean.items()}


def test_evaluate_shuffles_captions_to_other_images_only() -> None:
    samples = [make_sample(f"thing number {i}", f"thing number {i}", index=i) for i in range(20)]
    result = evaluate(samples, java=False, resamples=0)
    assert result.mean["exact match"].value == 1
    assert result.shuffled["exact match"].value == 0
    assert result.shuffled["word F1"].value == pytest.approx(2 / 3)


def test_evaluate_warns_of_few_images() -> None:
    assert not evaluate(make_samples(50), java=False, resamples=0).notes
    (note,) = evaluate(make_samples(49), java=False, resamples=0).notes
    assert "unstable" in note


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "no predictions"),
        ([make_sample("a")], r"'0.jpg' \(index 0\) has no reference"),
        (
            [make_sample(("a", "b"), "a"), make_sample("a", "a", index=1)],
            r"'1.jpg'.* has 1 captions, but '0.jpg' has 2",
        ),
    ],
)
def test_evaluate_rejects_samples_that_cannot_be_scored(
    samples: list[Sample], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(samples, java=False)


# ---- CLIPScore ----


def test_clip_score_equals_that_of_clip_model_for_each_pair(tmp_path: Path) -> None:
    """The expected scores follow Hessel et al. 2021, with the embeddings that `CLIPModel` returns."""
    import torch
    from PIL import Image

    clip, tokenizer, processor = save_tiny_clip(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 32, 3), dtype=np.uint8)
    images = []
    for number, array in enumerate(pixels):
        path = tmp_path / f"{number}.png"
        Image.fromarray(array).save(path)
        images.append(path.read_bytes())
    samples = make_samples(3, trials=2, seed=4)

    @torch.no_grad()
    def cosines(caption: str, image: np.ndarray, reference: str) -> tuple[float, float]:
        """Return the cosine of the caption with the image, and with the reference."""
        prompts = [f"A photo depicts {text}" for text in (caption, reference)]
        ids = tokenizer(prompts, padding=True, return_tensors="pt")
        pixel_values = processor(image, return_tensors="pt").pixel_values
        output = clip(**ids, pixel_values=pixel_values)
        with_image = output.text_embeds[0] @ output.image_embeds[0]
        with_reference = output.text_embeds[0] @ output.text_embeds[1]
        return float(with_image), float(with_reference)

    result = evaluate(samples, clip=tmp_path, images=images, java=False)
    for image, sample in enumerate(samples):
        for trial, caption in enumerate(sample.captions):
            pairs = [cosines(caption, pixels[image], text) for text in sample.references]
            score = 2.5 * max(pairs[0][0], 0)
            nearest = max(0, *(with_reference for _, with_reference in pairs))
            harmonic = 2 * score * nearest / (score + nearest) if score + nearest else 0
            actual = result.per_image["CLIPScore"][trial, image]
            assert actual == pytest.approx(score, abs=1e-5)
            actual = result.per_image["RefCLIPScore"][trial, image]
            assert actual == pytest.approx(harmonic, abs=1e-5)
    distinct = set(result.per_image["CLIPScore"].round(3).ravel())
    assert len(distinct) > 3, "the scores depend on caption and image"


def test_clip_scores_rejects_folders_without_a_complete_clip_model(tmp_path: Path) -> None:
    from tiny import save_vision_model

    captions = [["a"] * 3]
    references = [["a"]] * 3
    with pytest.raises(ValueError, match="does not contain a complete CLIP model"):
        clip_scores(tmp_path / "none", [b""] * 3, captions, references)
    tower = save_vision_model("clip", tmp_path / "tower")
    with pytest.raises(ValueError, match=r"does not contain a complete CLIP model.*vision tower"):
        clip_scores(Path(tower), [b""] * 3, captions, references)
    # With a tokenizer, this folder could be loaded, but its text model would be random.
    clip, tokenizer, _ = save_tiny_clip(tmp_path / "whole")
    tokenizer.save_pretrained(tower)
    with pytest.raises(ValueError, match=r"does not contain a complete CLIP model.*vision tower"):
        clip_scores(Path(tower), [b""] * 3, captions, references)
    weights = clip.state_dict()
    del weights["text_projection.weight"]
    clip.save_pretrained(tmp_path / "whole", state_dict=weights)
    with pytest.raises(ValueError, match=r"no weights for text_projection\.weight"):
        clip_scores(tmp_path / "whole", [b""] * 3, captions, references)
