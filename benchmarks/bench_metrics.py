"""Score captions: ours against pycocoevalcap 1.2, the code of the COCO server, in one process.

    python benchmarks/bench_metrics.py [--images 5000] [--references 5]

Both sides get the same raw captions, and compute BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D, tokenization included
(pycocoevalcap starts two Java processes for it). Their scores must agree to 1e-6. The sides run alternately, three
times each, and the fastest run of each is reported.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import time
from typing import NamedTuple

from llava_simplified.evaluation import ptb_tokenizer
from llava_simplified.evaluation.ngram_metrics import ngram_metrics
from llava_simplified.evaluation.rouge import rouge_l

VOCABULARY = """a the on in of with and man woman dog cat horse child red green old young two three sits stands
runs holds near under street beach it's table grass water field snow city train boat sky tree hat ball kite"""
WORDS = VOCABULARY.split()
ROUNDS = 3


class Result(NamedTuple):
    """Scores of a corpus by name, and the seconds of tokenization."""

    scores: dict[str, float]
    tokenization: float


def make_corpus(num_images: int, num_references: int) -> tuple[list[str], list[list[str]]]:
    """Return captions and references of about the same lengths as in COCO.

    Invented words such as "thing17" give the vocabulary a long tail of rare words, as in COCO.
    """
    draw = random.Random(0)

    def vary(base: list[str]) -> str:
        """Return a sentence that shares most of its words with `base`, so that captions and references overlap."""
        words = []
        for word in base:
            words.append(word if draw.random() > 0.4 else draw.choice(WORDS))
        for position, _ in enumerate(words):
            if draw.random() <= 0.1:
                words[position] = f"thing{int(draw.expovariate(1 / 2000))}"
        # End with a noun, and not with a single letter such as "B.": in the Java tokenizer, the next caption decides
        # whether a single letter keeps its full stop.
        sentence = " ".join([*words, "field"]).capitalize()
        return sentence + draw.choice([".", "", ",", " ."])

    bases = [draw.choices(WORDS, k=draw.randint(7, 14)) for _ in range(num_images)]
    captions = [vary(base) for base in bases]
    references = []
    for base in bases:
        references.append([vary(base) for _ in range(num_references)])
    return captions, references


def score_ours(captions: list[str], references: list[list[str]]) -> Result:
    """Score with this project."""
    # Earlier rounds have filled the cache of the tokenizer, which would make this round faster than a real run.
    ptb_tokenizer._scan_chunk.cache_clear()
    start = time.perf_counter()
    tokens = [ptb_tokenizer.tokenize(caption) for caption in captions]
    reference_tokens = []
    for group in references:
        reference_tokens.append([ptb_tokenizer.tokenize(reference) for reference in group])
    tokenization = time.perf_counter() - start
    scores = {}
    for metric in ngram_metrics([tokens], reference_tokens):
        # Sum over images, and take the scores of the only trial.
        values = metric.finish(metric.statistics.sum(axis=1), len(captions))[0]
        scores.update(zip(metric.names, map(float, values)))
    scores["ROUGE-L"] = sum(map(rouge_l, tokens, reference_tokens)) / len(captions)
    return Result(scores, tokenization)


def score_pycocoevalcap(captions: list[str], references: list[list[str]]) -> Result:
    """Score with pycocoevalcap."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    caption_rows = {}
    reference_rows = {}
    for image, (caption, group) in enumerate(zip(captions, references)):
        caption_rows[image] = [{"caption": caption}]
        reference_rows[image] = [{"caption": reference} for reference in group]
    start = time.perf_counter()
    java = PTBTokenizer()
    tokens = java.tokenize(caption_rows)
    reference_tokens = java.tokenize(reference_rows)
    tokenization = time.perf_counter() - start
    bleu = Bleu(4).compute_score(reference_tokens, tokens, verbose=0)[0]
    scores = {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, start=1)}
    scores["CIDEr-D"] = float(Cider().compute_score(reference_tokens, tokens)[0])
    scores["ROUGE-L"] = float(Rouge().compute_score(reference_tokens, tokens)[0])
    return Result(scores, tokenization)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images",
        "--pictures",
        type=int,
        default=5000,
        help="Number of images, each with a caption",
    )
    parser.add_argument("--references", type=int, default=5, help="References per image")
    args = parser.parse_args()
    captions, references = make_corpus(args.images, args.references)
    sides = {"pycocoevalcap": score_pycocoevalcap, "ours": score_ours}
    best: dict[str, tuple[float, float]] = {}  # (total seconds, seconds of tokenization)
    scores: dict[str, dict[str, float]] = {}
    for _ in range(ROUNDS):
        for name, score in sides.items():
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):  # pycocoevalcap prints its progress
                result = score(captions, references)
            seconds = (time.perf_counter() - start, result.tokenization)
            best[name] = min(best.get(name, seconds), seconds)
            scores[name] = result.scores
    # The times are comparable only if both sides compute the same scores.
    for name, expected in scores["pycocoevalcap"].items():
        value = scores["ours"][name]
        assert abs(value - expected) < 1e-6, f"{name}: ours is {value}, pycocoevalcap's {expected}"
    for name, (total, tokenization) in best.items():
        print(
            f"{name:14} {total:6.2f} s   tokens {tokenization:5.2f} s, "
            f"scores {total - tokenization:5.2f} s"
        )
    ours_total, ours_tokenization = best["ours"]
    peer_total, peer_tokenization = best["pycocoevalcap"]
    without_tokens = (peer_total - peer_tokenization) / (ours_total - ours_tokenization)
    print(f"{args.images} images, {args.references} references each:")
    print(
        f"ours is {peer_total / ours_total:.1f} times as fast; without tokenization "
        f"{without_tokens:.1f} times"
    )


if __name__ == "__main__":
    main()
