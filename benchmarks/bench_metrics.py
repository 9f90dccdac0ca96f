"""Scoring captions: ours against pycocoevalcap 1.2, the COCO server's code, in one process.

    python benchmarks/bench_metrics.py [--pictures 5000] [--references 5]

Both get the same raw captions: BLEU-1..4, ROUGE-L and CIDEr-D, tokenising included (theirs starts two Java
processes). Scores must agree to 1e-6. Best of three runs each, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import time

from llava_simplified.evaluation import ptb_tokenizer as ptb
from llava_simplified.evaluation.ngram_metrics import ngram_metrics
from llava_simplified.evaluation.rouge import rouge_l

WORDS = [
    *(
        "a",
        "the",
        "on",
        "in",
        "of",
        "with",
        "and",
        "man",
        "woman",
        "dog",
        "cat",
        "horse",
        "child",
        "red",
        "green",
    ),
    *(
        "old",
        "young",
        "two",
        "three",
        "sits",
        "stands",
        "runs",
        "holds",
        "near",
        "under",
        "street",
        "beach",
        "it's",
    ),
    *(
        "table",
        "grass",
        "water",
        "field",
        "snow",
        "city",
        "train",
        "boat",
        "sky",
        "tree",
        "hat",
        "ball",
        "kite",
    ),
]


def make_corpus(pictures: int, references: int) -> tuple[list[str], list[list[str]]]:
    """Sentences of COCO's length, with names and numbers so that the vocabulary has COCO's long tail."""
    dice = random.Random(0)

    def sentence(base: list[str]) -> str:
        words = [word if dice.random() > 0.4 else dice.choice(WORDS) for word in base]
        words = [
            word if dice.random() > 0.1 else f"thing{int(dice.expovariate(1 / 2000))}"
            for word in words
        ]
        # Ends in a noun: whether a lone letter keeps its full stop depends, over there, on the next caption.
        return " ".join([*words, "field"]).capitalize() + dice.choice([".", "", ",", " ."])

    bases = [dice.choices(WORDS, k=dice.randint(7, 14)) for _ in range(pictures)]
    return [sentence(base) for base in bases], [
        [sentence(base) for _ in range(references)] for base in bases
    ]


def ours(captions: list[str], references: list[list[str]]) -> tuple[dict[str, float], float]:
    ptb._scan_chunk.cache_clear()
    start = time.perf_counter()
    tokens, true = (
        [[ptb.tokenize(c) for c in captions]],
        [[ptb.tokenize(r) for r in group] for group in references],
    )
    tokenised = time.perf_counter() - start
    scores = {}
    for metric in ngram_metrics(tokens, true):
        values = metric.finish(metric.statistics.sum(axis=1), len(captions))[0]
        scores.update(zip(metric.names, map(float, values)))
    scores["ROUGE-L"] = sum(map(rouge_l, tokens[0], true)) / len(captions)
    return scores, tokenised


def theirs(captions: list[str], references: list[list[str]]) -> tuple[dict[str, float], float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    start = time.perf_counter()
    java = PTBTokenizer()
    written = java.tokenize({i: [{"caption": c}] for i, c in enumerate(captions)})
    true = java.tokenize({i: [{"caption": r} for r in group] for i, group in enumerate(references)})
    tokenised = time.perf_counter() - start
    bleu = Bleu(4).compute_score(true, written, verbose=0)[0]
    scores = {f"BLEU-{n + 1}": float(value) for n, value in enumerate(bleu)}
    scores["CIDEr-D"] = float(Cider().compute_score(true, written)[0])
    return {**scores, "ROUGE-L": float(Rouge().compute_score(true, written)[0])}, tokenised


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--references", type=int, default=5)
    options = parser.parse_args()
    captions, references = make_corpus(options.pictures, options.references)
    best: dict[str, tuple[float, float]] = {}
    scores: dict[str, dict[str, float]] = {}
    for _ in range(3):
        for name, run in (("pycocoevalcap", theirs), ("ours", ours)):
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                scores[name], tokenised = run(captions, references)
            seconds = time.perf_counter() - start
            best[name] = min(best.get(name, (9e9, 0.0)), (seconds, tokenised))
    for name, value in scores["ours"].items():
        if name in scores["pycocoevalcap"]:
            assert abs(value - scores["pycocoevalcap"][name]) < 1e-6, (
                name,
                value,
                scores["pycocoevalcap"][name],
            )
    for name, (seconds, tokenised) in best.items():
        print(
            f"{name:14} {seconds:6.2f} s   tokens {tokenised:5.2f} s, scores {seconds - tokenised:5.2f} s"
        )
    (whole, tokens), (other, other_tokens) = best["ours"], best["pycocoevalcap"]
    alone = (other - other_tokens) / (whole - tokens)
    print(f"{options.pictures} pictures, {options.references} references each:")
    print(f"{other / whole:.1f} times as fast; without tokenising {alone:.1f} times")


if __name__ == "__main__":
    main()
