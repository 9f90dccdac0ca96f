"""Scores equal the COCO server's code and hand-made figures; intervals a bootstrap done the slow way."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llava_simplified.evaluation import metrics
from llava_simplified.evaluation.metrics import Sample, evaluate, word_f1
from llava_simplified.evaluation.ptb_tokenizer import tokenize

from .coco import make_samples, needs_java

CORPORA = [(80, 4, 0), (30, 1, 1), (1, 3, 2), (2, 2, 3)]  # pictures, most references, seed


def _sample(caption: str | tuple[str, ...], *references: str, index: int = 0) -> Sample:
    captions = caption if isinstance(caption, tuple) else (caption,)
    return Sample(str(index), f"{index}.jpg", "Describe.", references, captions)


def _server_scores(samples: list[Sample], trial: int) -> dict[str, tuple[float, np.ndarray]]:
    """Corpus and single scores from pycocoevalcap, on our tokens."""
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    true = {i: [tokenize(r) for r in s.references] for i, s in enumerate(samples)}
    ours = {i: [tokenize(s.captions[trial])] for i, s in enumerate(samples)}
    corpus, single = bleu.Bleu(4).compute_score(true, ours, verbose=0)
    found = {f"BLEU-{n + 1}": (corpus[n], np.array(single[n])) for n in range(4)}
    return {
        **found,
        "CIDEr-D": Cider().compute_score(true, ours),
        "ROUGE-L": Rouge().compute_score(true, ours),
    }


@pytest.mark.parametrize(("pictures", "most", "seed"), CORPORA)
def test_scores_equal_the_servers_code(pictures: int, most: int, seed: int) -> None:
    samples = make_samples(pictures, trials=3, most_references=most, seed=seed)
    result = evaluate(samples, java=False, resamples=0)
    for trial in range(3):
        for name, (value, single) in _server_scores(samples, trial).items():
            assert result.trials[trial][name].value == pytest.approx(value, abs=1e-9), name
            np.testing.assert_allclose(
                result.per_image[name][trial], single, atol=1e-9, err_msg=name
            )


def test_scores_equal_stored_ones() -> None:
    """The server's figures for `make_samples(60)`, Java's tokens included."""
    stored = {
        "BLEU-1": 0.575257377,
        "BLEU-2": 0.505971838,
        "BLEU-3": 0.438481528,
        "BLEU-4": 0.38051306,
        "CIDEr-D": 2.491999697,
        "ROUGE-L": 0.533556369,
    }
    result = evaluate(make_samples(60), java=False, resamples=0)
    for name, value in stored.items():
        assert result.mean[name].value == pytest.approx(value, abs=1e-6), name


@needs_java
@pytest.mark.slow
def test_the_whole_way_equals_the_servers_live() -> None:
    """Stanford's tokenizer, METEOR and all: nothing of ours on the other side."""
    ptbtokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    samples = make_samples(60, trials=2)
    result = evaluate(samples, resamples=0)
    java = ptbtokenizer.PTBTokenizer()
    true = java.tokenize({i: [{"caption": r} for r in s.references] for i, s in enumerate(samples)})
    for trial, scores in enumerate(result.trials):
        ours = java.tokenize({i: [{"caption": s.captions[trial]}] for i, s in enumerate(samples)})
        expected = dict(
            zip(
                ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"),
                Bleu(4).compute_score(true, ours, verbose=0)[0],
            )
        )
        for name, scorer in (("CIDEr-D", Cider()), ("ROUGE-L", Rouge()), ("METEOR", Meteor())):
            expected[name] = scorer.compute_score(true, ours)[0]
        for name, value in expected.items():
            assert scores[name].value == pytest.approx(value, abs=1e-6), name
    assert result.best["METEOR"].value > max(scores["METEOR"].value for scores in result.trials)
    assert any("SPICE left out" in note for note in result.notes) or "SPICE" in result.mean


def test_without_java_a_line_says_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    result = evaluate(make_samples(60), resamples=0)
    assert "METEOR" not in result.mean
    assert result.notes == ["METEOR and SPICE left out: no java on the PATH"]


def test_cider_equals_the_papers_formula() -> None:
    """Vedantam et al. 2015, equations 1 to 3, with natural logarithms and the customary factor 10."""
    samples = make_samples(25, seed=5)
    true = [[tokenize(r).split() for r in s.references] for s in samples]

    def grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
        return Counter(zip(*(words[i:] for i in range(n))))

    expected = []
    for sample, references in zip(samples, true):
        total = 0.0
        for n in range(1, 5):
            held = Counter(g for group in true for g in set().union(*(grams(r, n) for r in group)))

            def vector(
                words: list[str], n: int = n, held: Counter[tuple[str, ...]] = held
            ) -> dict[tuple[str, ...], float]:
                return {
                    g: c * math.log(len(samples) / max(1, held[g]))
                    for g, c in grams(words, n).items()
                }

            ours = vector(tokenize(sample.captions[0]).split())
            for reference in references:
                other = vector(reference)
                norms = math.hypot(*ours.values()) * math.hypot(*other.values())
                dot = sum(weight * other.get(g, 0) for g, weight in ours.items())
                total += dot / norms / len(references) / 4 if norms else 0
        expected.append(10 * total)
    result = evaluate(samples, java=False, resamples=0)
    np.testing.assert_allclose(result.per_image["CIDEr"][0], expected, atol=1e-9)


def test_intervals_equal_a_bootstrap_done_the_slow_way() -> None:
    samples, resamples, seed = make_samples(40, trials=2), 25, 7
    result = evaluate(samples, java=False, resamples=resamples, seed=seed)
    draws = np.random.default_rng(seed).multinomial(40, [1 / 40] * 40, size=resamples)
    single = _server_scores(samples, 1)
    bleu, cider = [], []
    for draw in draws:
        chosen = [i for i, times in enumerate(draw) for _ in range(times)]
        bleu.append(_server_scores([samples[i] for i in chosen], 1)["BLEU-3"][0])
        cider.append(single["CIDEr-D"][1][chosen].mean())
    for name, values in (("BLEU-3", bleu), ("CIDEr-D", cider)):
        expected = np.percentile(values, [2.5, 97.5])
        np.testing.assert_allclose(result.trials[1][name][1:], expected, atol=1e-9, err_msg=name)
    # and the interval of an average is about 1.96 standard errors wide on each side
    wide = evaluate(make_samples(400), java=False, resamples=4000)
    error = wide.per_image["word F1"][0].std() / math.sqrt(400)
    assert (wide.mean["word F1"].high - wide.mean["word F1"].low) / 2 == pytest.approx(
        1.96 * error, rel=0.06
    )


def test_mean_and_best_of_trials() -> None:
    samples = [
        _sample(("a cat", "a dog", "x"), "a dog", index=0),
        _sample(("the sea", "sky", "y"), "the sea", index=1),
    ]
    result = evaluate(samples, java=False)
    assert [scores["exact match"].value for scores in result.trials] == [0.5, 0.5, 0.0]
    assert result.mean["exact match"].value == pytest.approx(1 / 3)
    assert result.best["exact match"].value == 1
    assert result.best["BLEU-1"].value == pytest.approx(1)


def test_word_f1_is_of_bags_and_of_the_best_reference() -> None:
    assert word_f1("A cat cat", ["a cat on it"]) == pytest.approx(2 * 2 / (3 + 4))
    assert word_f1("a cat", ["two dogs", "A  CAT"]) == 1
    assert word_f1("", ["a"]) == word_f1("x", ["a"]) == 0


def test_what_is_novel_distinct_and_unseen() -> None:
    samples = [
        _sample("a cat", "a cat", index=0),  # learned by heart
        _sample("A  Cat", "a dog", "the dog", index=1),  # one of its references is in training
        _sample("a fox", "a fox", index=2),
        _sample("a bird", "a fish", index=3),
    ]
    result = evaluate(samples, train_captions=["A cat", "the dog"], java=False, resamples=0)
    assert result.shares == {
        "distinct captions": 0.75,
        "novel captions": 0.5,
        "unseen references": 0.5,
    }
    assert result.unseen["exact match"].value == 0.5
    alone = evaluate(samples[2:], java=False, resamples=0)
    assert {name: score.value for name, score in result.unseen.items()} == {
        name: score.value for name, score in alone.mean.items()
    }


def test_shuffled_captions_meet_other_pictures_only() -> None:
    samples = [_sample(f"thing number {i}", f"thing number {i}", index=i) for i in range(20)]
    result = evaluate(samples, java=False, resamples=0)
    assert result.mean["exact match"].value == 1
    assert result.shuffled["exact match"].value == 0
    assert result.shuffled["word F1"].value == pytest.approx(2 / 3)


def test_few_pictures_are_warned_of() -> None:
    assert not evaluate(make_samples(50), java=False, resamples=0).notes
    assert "unstable" in evaluate(make_samples(49), java=False, resamples=0).notes[0]


def test_samples_that_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="no predictions"):
        evaluate([], java=False)
    with pytest.raises(ValueError, match=r"'0.jpg' \(index 0\) has no reference"):
        evaluate([_sample("a")], java=False)
    with pytest.raises(
        ValueError, match=r"'1.jpg'.* has 1 captions, '0.jpg' has 2: .*run to its end"
    ):
        evaluate([_sample(("a", "b"), "a"), _sample("a", "a", index=1)], java=False)


def test_clip_score_equals_the_two_tower_model(tmp_path: Path) -> None:
    """Hessel et al. 2021, from the whole model's own embeddings, one pair at a time."""
    import torch
    from PIL import Image
    from tiny import make_tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(2)
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "</s>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    text = {
        **small,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 64,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = CLIPConfig(
        text_config=text,
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    clip = CLIPModel(config).eval()
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter, std=0.7)  # wild enough that the words matter
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    for part in (clip, tokenizer, processor):
        part.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 32, 3), dtype=np.uint8)
    images = []
    for i, array in enumerate(pixels):
        Image.fromarray(array).save(tmp_path / f"{i}.png")
        images.append((tmp_path / f"{i}.png").read_bytes())
    samples = make_samples(3, trials=2, seed=4)

    @torch.no_grad()
    def cosine(caption: str, image: np.ndarray, other: str) -> tuple[float, float]:
        ids = tokenizer(
            [f"A photo depicts {c}" for c in (caption, other)], padding=True, return_tensors="pt"
        )
        out = clip(**ids, pixel_values=processor(image, return_tensors="pt").pixel_values)
        return float(out.text_embeds[0] @ out.image_embeds[0]), float(
            out.text_embeds[0] @ out.text_embeds[1]
        )

    result = evaluate(samples, clip=tmp_path, images=images, java=False)
    for i, sample in enumerate(samples):
        for trial, caption in enumerate(sample.captions):
            pairs = [cosine(caption, pixels[i], reference) for reference in sample.references]
            score, nearest = 2.5 * max(pairs[0][0], 0), max(0, *(other for _, other in pairs))
            assert result.per_image["CLIPScore"][trial, i] == pytest.approx(score, abs=1e-5)
            harmonic = 2 * score * nearest / (score + nearest) if score + nearest else 0
            assert result.per_image["RefCLIPScore"][trial, i] == pytest.approx(harmonic, abs=1e-5)
    assert len(set(result.per_image["CLIPScore"].round(3).ravel())) > 3
    with pytest.raises(ValueError, match="not a folder of a CLIP model"):
        metrics.clip_scores(tmp_path / "none", images, [["a"] * 3], [["a"]] * 3)
    clip.vision_model.save_pretrained(tmp_path / "tower")
    with pytest.raises(
        ValueError, match=r"not a folder of a CLIP model \(a vision tower alone is none\)"
    ):
        metrics.clip_scores(tmp_path / "tower", images, [["a"] * 3], [["a"]] * 3)
