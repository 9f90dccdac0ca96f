"""How good captions are: the COCO server's scores without Java, intervals, and what scores alone don't tell.

BLEU, ROUGE-L and CIDEr-D equal pycocoevalcap 1.2, the COCO caption server's code (Chen et al. 2015,
arXiv:1504.00325). Each metric is a row of statistics per picture and a function of their sum, so that a
bootstrap over pictures is one matrix product, for the corpus metric BLEU too.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_simplified.evaluation.ptb_tokenizer import tokenize

UNSTABLE_BELOW = 50
"""Pictures: CIDEr weighs n-grams by how many pictures' references hold them, so few won't do."""


HEADLINES = (
    *("CIDEr-D", "CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "METEOR", "SPICE"),
    *("CLIPScore", "RefCLIPScore", "word F1", "exact match"),
)
"""The order in which scores are shown. CIDEr-D is what the COCO server, and so every paper, calls CIDEr."""


@dataclass(frozen=True)
class Sample:
    """One picture of a test: its reference captions and the captions that were written, one a trial."""

    index: str
    image: str
    instruction: str
    references: tuple[str, ...]
    captions: tuple[str, ...]


class Score(NamedTuple):
    """A score and its 95 % bootstrap interval (nan where there is none)."""

    value: float
    low: float = math.nan
    high: float = math.nan


Scores = dict[str, Score]


@dataclass
class Evaluation:
    """Every score of one set of predictions.

    Attributes:
        trials, mean, best: scores of each trial, their mean, and of each picture's best trial by each metric.
        shuffled: the mean when each picture gets another one's captions: what can be had without looking.
        unseen: the mean on the pictures none of whose references is a training caption.
        shares: of distinct captions; with training captions also of novel captions and unseen references.
        per_image: metric -> (trials, pictures) array.
        notes: what was left out and why, and warnings.
    """

    pictures: int
    trials: list[Scores]
    mean: Scores
    best: Scores
    shuffled: Scores = field(default_factory=dict)
    unseen: Scores = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    per_image: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class _Metric(NamedTuple):
    """`finish(sums (..., k), pictures)` -> (..., len(names)) turns summed statistics into scores."""

    names: tuple[str, ...]
    statistics: np.ndarray  # (trials, pictures, k)
    finish: Callable[[np.ndarray, int], np.ndarray]


def _mean_metric(name: str, scores: np.ndarray) -> _Metric:
    return _Metric((name,), scores[..., None], lambda sums, count: sums / count)


# -------------------------------------------------------------------------------------- COCO's metrics


class _NGrams(NamedTuple):
    """Distinct 1- to 4-grams of texts, one entry per text and n-gram."""

    text: np.ndarray
    gram: np.ndarray  # ids that run on over the four orders
    order: np.ndarray  # n - 1
    times: np.ndarray
    kinds: int  # how many ids there are

    def of(self, chosen: np.ndarray) -> _NGrams:
        return _NGrams(
            self.text[chosen], self.gram[chosen], self.order[chosen], self.times[chosen], self.kinds
        )

    def sums(self, weights: np.ndarray, texts: int) -> np.ndarray:
        """(texts, 4): the weights of the entries, summed per text and order."""
        return np.bincount(self.text * 4 + self.order, weights, minlength=texts * 4).reshape(
            texts, 4
        )


def _count_ngrams(texts: Sequence[Sequence[str]]) -> _NGrams:
    vocabulary: dict[str, int] = {}
    word = np.array(
        [vocabulary.setdefault(w, len(vocabulary)) for text in texts for w in text], np.int64
    )
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    position, gram, size, kinds = np.arange(len(word)), word, len(vocabulary), 0
    parts: list[tuple[np.ndarray, ...]] = []
    for order in range(4):
        if order:  # an n-gram is the (n-1)-gram that begins here and one more word of the same text
            fits = position + order < len(word)
            fits[fits] = owner[position[fits] + order] == owner[position[fits]]
            position = position[fits]
            longer = gram[fits] * len(vocabulary) + word[position + order]
            distinct, gram = np.unique(longer, return_inverse=True)
            size = len(distinct)
        pair, count = np.unique(owner[position] * max(size, 1) + gram, return_counts=True)
        text, kind = np.divmod(pair, max(size, 1))
        parts.append((text, kind + kinds, np.full(len(pair), order), count))
        kinds += size
    text, gram, orders, times = (np.concatenate(column) for column in zip(*parts))
    return _NGrams(text, gram, orders, times, max(kinds, 1))


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[keys == wanted], 0 where there is none. `keys` are sorted."""
    if not len(keys):
        return np.zeros(len(wanted))
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def _ngram_metrics(captions: list[list[str]], references: list[list[str]]) -> list[_Metric]:
    """BLEU-1..4, CIDEr-D and CIDEr of tokenised captions (trials x pictures); `references` per picture."""
    written = [caption.split() for trial in captions for caption in trial]
    true = [[reference.split() for reference in group] for group in references]
    flat = [words for group in true for words in group]
    grams = _count_ngrams(written + flat)
    ours = grams.text < len(written)
    theirs = grams.of(~ours)._replace(text=grams.text[~ours] - len(written))
    picture_of = np.repeat(np.arange(len(true)), [len(group) for group in true])
    bleu = _bleu_statistics(written, grams.of(ours), true, theirs, picture_of)
    clipped, whole = _cider(written, grams.of(ours), flat, theirs, picture_of)
    shape = len(captions), len(references)
    return [
        _mean_metric("CIDEr-D", clipped.reshape(shape)),
        _mean_metric("CIDEr", whole.reshape(shape)),
        _Metric(("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"), bleu.reshape(*shape, 10), _bleu),
    ]


def _bleu_statistics(
    written: list[list[str]],
    ours: _NGrams,
    true: list[list[list[str]]],
    theirs: _NGrams,
    picture_of: np.ndarray,
) -> np.ndarray:
    """(captions, 10): n-grams that a reference has too, n-grams, words, words of the closest reference."""
    key = picture_of[theirs.text] * ours.kinds + theirs.gram
    sort = np.argsort(key, kind="stable")
    keys, first = np.unique(key[sort], return_index=True)
    most = np.maximum.reduceat(theirs.times[sort], first) if len(first) else first
    allowed = _lookup(keys, most, ours.text % len(true) * ours.kinds + ours.gram)
    correct = ours.sums(np.minimum(ours.times, allowed), len(written))
    lengths = np.array([len(words) for words in written])
    targets = []
    for i, length in enumerate(lengths.tolist()):
        targets.append(
            min((abs(len(words) - length), len(words)) for words in true[i % len(true)])[1]
        )
    guessed = np.maximum(lengths[:, None] - np.arange(4), 0)
    return np.column_stack([correct, guessed, lengths, targets])


def _cider(
    written: list[list[str]],
    ours: _NGrams,
    true: list[list[str]],
    theirs: _NGrams,
    picture_of: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """CIDEr-D and CIDEr (Vedantam et al. 2015, arXiv:1411.5726) of each caption.

    CIDEr-D clips counts to the reference's and punishes other lengths; length is measured in bigrams.
    """
    pictures = int(picture_of[-1]) + 1
    holds = np.unique(picture_of[theirs.text] * ours.kinds + theirs.gram) % ours.kinds
    idf = math.log(pictures) - np.log(np.maximum(1, np.bincount(holds, minlength=ours.kinds)))
    norm = np.sqrt(ours.sums((ours.times * idf[ours.gram]) ** 2, len(written)))
    their_norm = np.sqrt(theirs.sums((theirs.times * idf[theirs.gram]) ** 2, len(true)))
    bigrams, their_bigrams = (
        np.maximum([len(words) - 1 for words in texts], 0) for texts in (written, true)
    )
    key = ours.text * ours.kinds + ours.gram
    sort = np.argsort(key)
    scores = np.zeros((2, len(written)))
    for start in range(0, len(written), pictures):  # a trial: each reference meets one caption
        caption = start + picture_of
        found = _lookup(
            key[sort], ours.times[sort], caption[theirs.text] * ours.kinds + theirs.gram
        )
        norms = norm[caption] * their_norm
        penalty = math.e ** (-((bigrams[caption] - their_bigrams) ** 2) / (2 * 6.0**2))
        for kind, (count, factor) in enumerate(
            ((np.minimum(found, theirs.times), penalty), (found, 1.0))
        ):
            dot = theirs.sums(count * theirs.times * idf[theirs.gram] ** 2, len(true))
            cosine = (
                np.divide(dot, norms, out=np.zeros_like(norms), where=norms > 0).mean(axis=1)
                * factor
            )
            mean = np.bincount(picture_of, cosine) / np.bincount(picture_of)
            scores[kind, start : start + pictures] = 10 * mean
    return scores[0], scores[1]


def _bleu(sums: np.ndarray, _: int) -> np.ndarray:
    """BLEU-1..4 (Papineni et al. 2002) of summed (4 correct, 4 guessed, length, reference length)."""
    small, tiny = 1e-9, 1e-15  # the server's guards against 0 / 0
    precision = np.cumprod((sums[..., :4] + tiny) / (sums[..., 4:8] + small), axis=-1)
    precision **= 1 / np.arange(1, 5)
    ratio = (sums[..., 8:9] + tiny) / (sums[..., 9:] + small)
    with np.errstate(over="ignore"):
        return precision * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest one; bit-parallel (Hyyrö 2004): one row of the table is one integer."""
    masks: dict[str, int] = {}
    for bit, word in enumerate(first):
        masks[word] = masks.get(word, 0) | 1 << bit
    full = row = (1 << len(first)) - 1
    for word in second:
        common = row & masks.get(word, 0)
        row = (row + common | row - common) & full
    return len(first) - row.bit_count()


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004) of tokenised texts: best precision and best recall over references, beta 1.2."""
    words = caption.split(" ")
    others = [reference.split(" ") for reference in references]
    common = [_common_subsequence(words, other) for other in others]
    precision, recall = (
        max(common) / len(words),
        max(c / len(other) for c, other in zip(common, others)),
    )
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if max(common) else 0.0


# --------------------------------------------------------------------------------------- other metrics


def plain(caption: str) -> str:
    """Lower case, single blanks: the form in which captions are compared as wholes."""
    return " ".join(caption.lower().split())


def word_f1(caption: str, references: Sequence[str]) -> float:
    """F1 between bags of lower-cased, blank-separated words, with the reference where it is best."""
    words = Counter(caption.lower().split())
    best = 0.0
    for reference in references:
        true = Counter(reference.lower().split())
        total = words.total() + true.total()
        best = max(best, 2 * (words & true).total() / total if total else 1.0)
    return best


def clip_scores(
    model: Path,
    images: Sequence[bytes],
    captions: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
) -> tuple[np.ndarray, np.ndarray]:
    """CLIPScore and RefCLIPScore (Hessel et al. 2021, arXiv:2104.08718), each (trials, pictures).

    2.5 * max(cos, 0) between picture and "A photo depicts " + caption; and its harmonic mean with the best
    cosine between caption and references. `model` is a folder that `transformers.CLIPModel` loads.
    """
    import torch
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    from llava_simplified.data.images import decode_image

    try:
        clip = CLIPModel.from_pretrained(model).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        processor = CLIPImageProcessorPil.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model}: not a folder of a CLIP model (a vision tower alone is none): {error}"
        ) from None
    texts = sorted({text for group in [*captions, *references] for text in group})
    row = {text: number for number, text in enumerate(texts)}

    @torch.inference_mode()
    def embed(
        items: Sequence[object], encode: Callable[[Sequence[object]], torch.Tensor]
    ) -> torch.Tensor:
        parts = [encode(items[at : at + 64]) for at in range(0, len(items), 64)]
        return torch.nn.functional.normalize(torch.cat(parts).float(), dim=-1)

    def encode_text(batch: Sequence[object]) -> torch.Tensor:
        prompts = [f"A photo depicts {text}" for text in batch]
        limit = clip.config.text_config.max_position_embeddings
        ids = tokenizer(
            prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        return clip.text_projection(clip.text_model(**ids).pooler_output)

    def encode_image(batch: Sequence[object]) -> torch.Tensor:
        pixels = processor([decode_image(data) for data in batch], return_tensors="pt")  # type: ignore[arg-type]
        return clip.visual_projection(clip.vision_model(**pixels).pooler_output)

    text, image = embed(texts, encode_text), embed(images, encode_image)
    written = torch.stack([text[[row[caption] for caption in trial]] for trial in captions])
    score = 2.5 * (written * image).sum(-1).clamp(min=0).numpy()
    closest = [
        (written[:, i] @ text[[row[r] for r in group]].T).amax(-1)
        for i, group in enumerate(references)
    ]
    nearest = torch.stack(closest, dim=1).clamp(min=0).numpy()
    both = score + nearest
    return score, np.divide(2 * score * nearest, both, out=np.zeros_like(both), where=both > 0)


def _java_metrics(
    captions: list[list[str]], references: list[list[str]]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """METEOR and SPICE through pycocoevalcap: name -> array, and notes.

    A row a trial and one for each picture's best trial; column 0 the corpus score, the others the pictures'.
    """
    if not shutil.which("java"):
        return {}, ["METEOR and SPICE left out: no java on the PATH"]
    if not importlib.util.find_spec("pycocoevalcap"):
        return {}, [
            "METEOR and SPICE left out: pycocoevalcap is not installed (pip install pycocoevalcap)"
        ]
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice import spice

    true = dict(enumerate(references))
    scorers, notes = {"METEOR": Meteor}, []
    models = Path(spice.__file__).parent / "lib" / "stanford-corenlp-3.6.0-models.jar"
    if models.is_file():
        scorers["SPICE"] = spice.Spice
    else:  # its constructor would fetch them over http without asking
        notes.append(f"SPICE left out: {models} is not there; "
                     "`python -m pycocoevalcap.spice.get_stanford_models` downloads it (0.4 GB)")  # fmt: skip
    found = {}
    for name, scorer in scorers.items():
        judge = scorer()
        rows: list[list[float]] = []
        for trial in [*captions, None]:
            if trial is None:  # last: each picture's best caption
                best = np.array(rows)[:, 1:].argmax(axis=0)
                trial = [captions[choice][picture] for picture, choice in enumerate(best)]
            corpus, scores = judge.compute_score(
                true, {i: [caption] for i, caption in enumerate(trial)}
            )
            rows.append([corpus, *(s["All"]["f"] if name == "SPICE" else s for s in scores)])
        found[name] = np.array(rows)
    return found, notes


# ------------------------------------------------------------------------------------------ evaluation


def evaluate(
    samples: Sequence[Sample],
    *,
    train_captions: Iterable[str] | None = None,
    clip: Path | None = None,
    images: Sequence[bytes] = (),
    java: bool = True,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Score predictions.

    Args:
        train_captions: what was trained on: gives the shares of novel captions and of unseen references.
        clip, images: a CLIP model's folder and the pictures' bytes, in the samples' order: gives CLIPScore.
        java: METEOR and SPICE too, where Java and pycocoevalcap are installed.
        resamples: of the bootstrap over pictures; 0 for no intervals.

    Raises:
        ValueError: no samples, a sample without references, or unequal numbers of trials.
    """
    _check(samples)
    count = len(samples)
    captions = [list(trial) for trial in zip(*(sample.captions for sample in samples))]
    references = [sample.references for sample in samples]
    result = _evaluate(
        captions, references, resamples, seed, _clip_metrics(clip, images, captions, references)
    )
    if java:
        _add_java(result, captions, references)
    if count < UNSTABLE_BELOW:
        result.notes.append(
            f"only {count} pictures with references: CIDEr is unstable under {UNSTABLE_BELOW}"
        )
    if count > 1:
        order = np.random.default_rng(seed).permutation(count)
        other = dict(
            zip(order.tolist(), np.roll(order, 1).tolist())
        )  # one cycle: nobody keeps its own captions
        swapped = [[trial[other[i]] for i in range(count)] for trial in captions]
        result.shuffled = _evaluate(swapped, references, resamples, seed).mean
    distinct = [len(set(map(plain, trial))) / count for trial in captions]
    result.shares["distinct captions"] = float(np.mean(distinct))
    if train_captions is not None:
        known = {plain(caption) for caption in train_captions}
        result.shares["novel captions"] = float(
            np.mean([plain(c) not in known for t in captions for c in t])
        )
        unseen = [i for i, group in enumerate(references) if known.isdisjoint(map(plain, group))]
        result.shares["unseen references"] = len(unseen) / count
        if unseen:
            part = [[trial[i] for i in unseen] for trial in captions]
            result.unseen = _evaluate(part, [references[i] for i in unseen], resamples, seed).mean
    return result


def _check(samples: Sequence[Sample]) -> None:
    if not samples:
        raise ValueError("no predictions to evaluate")
    first = samples[0]
    for sample in samples:
        where = f"picture {sample.image!r} (index {sample.index})"
        if not sample.references:
            raise ValueError(
                f"{where} has no reference caption: give 'gt_caption' in its row or --references"
            )
        if len(sample.captions) != len(first.captions):
            raise ValueError(
                f"{where} has {len(sample.captions)} captions, {first.image!r} has {len(first.captions)}: "
                "each picture needs one row per trial; did the prediction run to its end?"
            )


def _evaluate(
    captions: list[list[str]],
    references: Sequence[Sequence[str]],
    resamples: int,
    seed: int,
    more: Sequence[_Metric] = (),
) -> Evaluation:
    tokens, true = _tokens(captions), _tokens(references)
    metrics = _ngram_metrics(tokens, true)
    for name, score, texts, others in (
        ("ROUGE-L", rouge_l, tokens, true),
        ("word F1", word_f1, captions, references),
        ("exact match", lambda text, group: plain(text) in map(plain, group), captions, references),
    ):
        scores = [[score(text, group) for text, group in zip(trial, others)] for trial in texts]
        metrics.append(_mean_metric(name, np.array(scores, float)))
    return _summary([*metrics, *more], len(references), resamples, seed)


def _tokens(groups: Iterable[Iterable[str]]) -> list[list[str]]:
    return [[tokenize(text) for text in group] for group in groups]


def _clip_metrics(
    clip: Path | None,
    images: Sequence[bytes],
    captions: list[list[str]],
    references: Sequence[Sequence[str]],
) -> list[_Metric]:
    if clip is None:
        return []
    scores = clip_scores(clip, images, captions, references)
    return [_mean_metric(name, score) for name, score in zip(("CLIPScore", "RefCLIPScore"), scores)]


def _add_java(
    result: Evaluation, captions: list[list[str]], references: Sequence[Sequence[str]]
) -> None:
    found, notes = _java_metrics(_tokens(captions), _tokens(references))
    result.notes += notes
    for (
        name,
        rows,
    ) in found.items():  # without intervals: METEOR's corpus score isn't a mean over pictures
        result.per_image[name] = rows[:-1, 1:]
        for scores, value in zip(result.trials, rows[:, 0]):
            scores[name] = Score(float(value))
        result.mean[name], result.best[name] = (
            Score(float(rows[:-1, 0].mean())),
            Score(float(rows[-1, 0])),
        )


def _summary(metrics: Sequence[_Metric], pictures: int, resamples: int, seed: int) -> Evaluation:
    """Values and intervals of each trial, of their mean and of each picture's best trial."""
    result = Evaluation(pictures, [{} for _ in metrics[0].statistics], {}, {})
    rng, chunk = np.random.default_rng(seed), max(1, 20_000_000 // pictures)
    # How often each resample holds each picture. CIDEr's document frequencies stay those of the whole set:
    # pictures that a resample holds twice would make every rare n-gram look common.
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    draws = [
        rng.multinomial(pictures, [1 / pictures] * pictures, size=size).astype(float)
        for size in sizes
    ]
    for metric in metrics:
        single = metric.finish(
            metric.statistics, 1
        )  # (trials, pictures, names): each picture a corpus of one
        for column, name in enumerate(metric.names):
            result.per_image[name] = own = single[..., column]
            best = np.take_along_axis(metric.statistics, own.argmax(axis=0)[None, :, None], axis=0)
            statistics = np.concatenate([metric.statistics, best])  # (trials + 1, pictures, k)
            values = metric.finish(statistics.sum(axis=1), pictures)[..., column]
            sums = [np.stack([draw @ trial for trial in statistics], axis=1) for draw in draws]
            drawn = [metric.finish(part, pictures)[..., column] for part in sums]
            bootstrap = np.concatenate(
                drawn or [np.full((1, len(values)), np.nan)]
            )  # (resamples, trials + 1)
            for trial, scores in enumerate(result.trials):
                scores[name] = _score(values[trial], bootstrap[:, trial])
            result.mean[name] = _score(values[:-1].mean(), bootstrap[:, :-1].mean(axis=1))
            result.best[name] = _score(values[-1], bootstrap[:, -1])
    return result


def _score(value: float, bootstrap: np.ndarray) -> Score:
    low, high = np.percentile(bootstrap, [2.5, 97.5])
    return Score(float(value), float(low), float(high))
