"""Rewards, compared with pycocoevalcap and the evaluation, and what happens when one fails."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from tiny import save_tiny_clip

from llava_simplified.data.questions import Question
from llava_simplified.data.records import Record
from llava_simplified.evaluation.clip_metrics import clip_scores
from llava_simplified.evaluation.metrics import word_f1
from llava_simplified.evaluation.ptb_tokenizer import tokenize
from llava_simplified.prompt import Message
from llava_simplified.training import clip_reward
from llava_simplified.training.cider_reward import CiderScorer, DocumentFrequencies
from llava_simplified.training.rewards import (
    Reward,
    RewardOptions,
    length_reward,
    parse_rewards,
    rewarded_image,
)
from llava_simplified.training.user_reward import UserReward

REFERENCES = [
    ["A red car parked on the street.", "a car, red, in a street"],
    ["two dogs run over a green field", "Dogs running in a field!", "two dogs"],
    ["a man reads a book on a bench"],
    ["the street is empty", "an empty street in the rain"],
]
CAPTIONS = ["a red red car on a street", "two dogs in a field", "a man's bench", "a red car"]
IDS = ["train.json row 1", "train.json row 2", "train.json row 3", "train.json row 4"]


@dataclass
class CaptionedRecord:
    """The attributes of a record that rewards read."""

    id: str
    image: str = ""
    references: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()


RECORDS = [CaptionedRecord(name, references=tuple(group)) for name, group in zip(IDS, REFERENCES)]


def stock_scores(scorer: object, column: int | None = None) -> list[float]:
    references = {i: [tokenize(text) for text in group] for i, group in enumerate(REFERENCES)}
    captions = {i: [tokenize(text)] for i, text in enumerate(CAPTIONS)}
    _, scores = scorer.compute_score(references, captions)
    return list(scores if column is None else scores[column])


def reward_of(text: str, captions: list[str] = CAPTIONS) -> list[float]:
    return Reward(text, REFERENCES)(RECORDS, captions)


def test_cider_equals_pycocoevalcap() -> None:
    assert reward_of("cider") == pytest.approx(stock_scores(Cider()), abs=1e-12)


def test_cider_of_a_batch_uses_the_frequencies_of_all_training_records() -> None:
    """The score of a caption must not depend on the other images of its step."""
    frequencies = DocumentFrequencies.count(REFERENCES)
    alone = CiderScorer(frequencies).score(CAPTIONS[3], REFERENCES[0])
    reward = Reward("cider", REFERENCES)
    assert reward(RECORDS[:1], CAPTIONS[3:]) == [alone]
    assert alone > 0


def test_bleu4_and_rouge_l_equal_pycocoevalcap(capsys: pytest.CaptureFixture[str]) -> None:
    assert reward_of("bleu4") == pytest.approx(stock_scores(Bleu(4), 3), abs=1e-12)
    assert reward_of("rouge_l") == pytest.approx(stock_scores(Rouge()), abs=1e-12)


def test_weighted_sum_adds_the_rewards() -> None:
    expected = []
    for caption, group, cider in zip(CAPTIONS, REFERENCES, reward_of("cider")):
        expected.append(0.5 * cider + word_f1(caption, group) - 2 * length_reward(caption, group))
    assert reward_of("cider=0.5, word_f1,length=-2") == pytest.approx(expected)


def test_length_reward_is_highest_at_the_length_of_a_reference() -> None:
    references = ["one two three four", "one two"]
    assert length_reward("a b c d", references) == length_reward("a b", references) == 1
    assert length_reward("a b c d e", references) == 0.75
    assert length_reward("", references) == length_reward("a " * 8, references) == 0


def test_every_text_reward_accepts_an_empty_caption() -> None:
    assert reward_of("cider,bleu4,rouge_l,word_f1,length", [""] * 4) == pytest.approx([0] * 4)


@pytest.mark.parametrize("text", ["", "cidre", "cider=x", "cider=nan", "cider,cider", "length=inf"])
def test_malformed_reward_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="--reward"):
        parse_rewards(text)


# ---- document frequencies ----


def test_frequencies_are_stored_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "out" / "frequencies.json"
    options = RewardOptions(frequencies_file=path, data_digest="train.json")
    first = Reward("cider", REFERENCES, options)(RECORDS, CAPTIONS)
    assert first == reward_of("cider")

    def refuse() -> Iterator[list[str]]:
        raise AssertionError("the references are read again")
        yield []

    assert Reward("cider", refuse(), options)(RECORDS, CAPTIONS) == first


def test_frequencies_of_other_records_or_of_a_damaged_file_are_counted_again(
    tmp_path: Path,
) -> None:
    path = tmp_path / "frequencies.json"
    DocumentFrequencies.count(REFERENCES[:2]).save(path, "other.json")
    options = RewardOptions(frequencies_file=path, data_digest="train.json")
    for damaged in (None, "{", '{"data": "train.json", "frequencies": []}'):
        if damaged is not None:
            path.write_text(damaged)
        assert Reward("cider", REFERENCES, options)(RECORDS, CAPTIONS) == reward_of("cider")
        assert json.loads(path.read_text())["data"] == "train.json"


# ---- reward functions of the user ----

USER_MODULE = """
import os, time

def words(images, references, captions):
    assert len(images) == len(references) == len(captions)
    assert isinstance(references[0], list)
    return [len(caption.split()) for caption in captions]

def path(images, references, captions):
    return [float(image == f"{index}.jpg") for index, image in enumerate(images)]

def process(images, references, captions):
    return [os.getpid()] * len(captions)

def broken(images, references, captions):
    if any("dogs" in caption for caption in captions):
        raise KeyError("no such word")
    return [0] * len(captions)

def not_a_number(images, references, captions):
    return [float("nan") if "dogs" in caption else 0.0 for caption in captions]

def too_few(images, references, captions):
    return [1.0]

def hangs(images, references, captions):
    if any("dogs" in caption for caption in captions):
        time.sleep(60)
    return [0] * len(captions)

def crashes(images, references, captions):
    os._exit(3)
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Write a module with reward functions to the current folder, and return its name."""
    (tmp_path / "user_reward_module.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield "user_reward_module"
    sys.modules.pop("user_reward_module", None)


def user_reward(name: str, workers: int = 0, timeout: float = 60.0) -> list[float]:
    options = RewardOptions(workers=workers, timeout=timeout)
    return Reward(name, REFERENCES, options)(RECORDS, CAPTIONS)


def test_user_function_gets_paths_references_and_captions(user_module: str) -> None:
    records = [CaptionedRecord(str(i), f"{i}.jpg", ("a",)) for i in range(4)]
    assert user_reward(f"{user_module}:words=2") == [14.0, 10.0, 6.0, 6.0]
    assert Reward(f"{user_module}:path", REFERENCES)(records, CAPTIONS) == [1.0] * 4


@pytest.mark.parametrize("name", ["broken", "not_a_number"])
def test_user_function_that_fails_is_an_error_with_the_record(user_module: str, name: str) -> None:
    with pytest.raises(ValueError, match=name) as error:
        user_reward(f"{user_module}:{name}")
    # The error names the record of the second caption only.
    assert [record_id for record_id in IDS if record_id in str(error.value)] == [IDS[1]]


def test_user_function_must_return_a_number_per_caption(user_module: str) -> None:
    with pytest.raises(ValueError, match="too_few") as error:
        user_reward(f"{user_module}:too_few")
    assert "expected 4 rewards" in str(error.value)


@pytest.mark.parametrize("missing", ["user_reward_module:nothing", "no_such_module:function"])
def test_user_function_that_is_missing_is_an_error_at_once(user_module: str, missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        Reward(missing, REFERENCES)


@pytest.mark.medium
def test_user_function_runs_in_worker_processes(user_module: str) -> None:
    assert user_reward(f"{user_module}:words", workers=3) == user_reward(f"{user_module}:words")
    reward = Reward(f"{user_module}:process", REFERENCES, RewardOptions(workers=2))
    first = reward(RECORDS, CAPTIONS)
    assert len(set(first)) == 2
    assert os.getpid() not in first
    # The second call uses the same processes.
    assert set(reward(RECORDS, CAPTIONS)) == set(first)


@pytest.mark.medium
@pytest.mark.parametrize(("name", "reason"), [("crashes", "exit code 3"), ("broken", "KeyError")])
def test_worker_that_fails_is_an_error_with_the_record(
    user_module: str, name: str, reason: str
) -> None:
    """With a process per caption, the message names one record."""
    with pytest.raises(ValueError, match=reason) as error:
        user_reward(f"{user_module}:{name}", workers=4)
    named = [record_id for record_id in IDS if record_id in str(error.value)]
    assert len(named) == 1
    assert name == "crashes" or named == [IDS[1]]


@pytest.mark.medium
def test_function_that_hangs_is_an_error_with_the_record(user_module: str) -> None:
    reward = UserReward(f"{user_module}:hangs", workers=2, timeout=600.0)
    images = [""] * 2
    quick = reward(IDS[:2], images, REFERENCES[:2], ["a", "b"])  # starts the processes
    assert quick == [0.0, 0.0]
    reward._timeout = 2.0
    with pytest.raises(ValueError, match="--reward_timeout 2 s") as error:
        reward(IDS[:2], images, REFERENCES[:2], CAPTIONS[:2])
    assert IDS[1] in str(error.value)
    # Other processes have replaced those that were ended.
    reward._timeout = 600.0
    assert reward(IDS[:2], images, REFERENCES[:2], ["a", "b"]) == quick


def test_cider_of_a_single_record_is_refused() -> None:
    with pytest.raises(ValueError, match="word_f1"):
        CiderScorer(DocumentFrequencies.count(REFERENCES[:1]))
    scorer = CiderScorer(DocumentFrequencies.count(REFERENCES[:2]))
    assert math.isfinite(scorer.score("a", REFERENCES[0]))


# ---- clipscore ----


@pytest.mark.medium
def test_clipscore_equals_the_evaluation(data_folder: Path, tmp_path: Path) -> None:
    save_tiny_clip(tmp_path)
    images = [str(data_folder / "images" / f"{number % 5}.jpg") for number in range(12)]
    captions = [" ".join(group) for group in itertools.permutations(["red", "dogs", "car", "a"], 2)]
    records = [CaptionedRecord(f"row {i}", image) for i, image in enumerate(images)]
    files = [Path(image).read_bytes() for image in images]
    expected, _ = clip_scores(tmp_path, files, [captions], [["a"]] * 12)
    reward = Reward("clipscore", [], RewardOptions(clip=str(tmp_path)))
    assert reward(records, captions) == pytest.approx(expected[0].tolist(), abs=1e-6)
    assert (expected[0] > 0.01).sum() > 2
    # The scores are the same if the images come from the cache, in another order.
    again = reward(records[::-1], captions[::-1])
    assert again[::-1] == pytest.approx(expected[0].tolist(), abs=1e-6)


def test_clipscore_reads_few_files_at_a_time(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`llava pairs` passes a thousand records at once, whose images may be large."""
    sizes: list[int] = []

    class Embedder:
        def __init__(self, *_: object) -> None: ...

        def embed_texts(self, texts: list[str]) -> torch.Tensor:
            return torch.ones(len(texts), 1)

        def embed_images(self, files: list[bytes]) -> torch.Tensor:
            sizes.append(len(files))
            return torch.ones(len(files), 1)

    monkeypatch.setattr(clip_reward, "ClipEmbedder", Embedder)
    monkeypatch.setattr(clip_reward, "_FILES_IN_MEMORY", 2)
    images = [str(data_folder / "images" / f"{number}.jpg") for number in range(5)]
    reward = clip_reward.ClipReward("", "cpu")
    assert len(reward(images, images, ["a"] * 5)) == 5
    assert sizes == [2, 2, 1]


@pytest.mark.medium
def test_clipscore_without_an_image_is_an_error_with_the_record(
    tmp_path: Path,
) -> None:
    save_tiny_clip(tmp_path)
    reward = Reward("clipscore", [], RewardOptions(clip=str(tmp_path)))
    for image in ("", str(tmp_path / "none.jpg")):
        with pytest.raises(ValueError, match=IDS[2]):
            reward([CaptionedRecord(IDS[2], image)], ["a"])


@pytest.mark.parametrize(
    "name", ["photos/cats/1.jpg", "/nowhere/cats/1.jpg", "cats/1.jpg", "s.tar#cats/1"]
)
def test_rewards_read_the_image_that_training_reads(tmp_path: Path, name: str) -> None:
    """The name in a record may differ from the path of the file."""
    image = tmp_path / "images" / "cats" / "1.jpg"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(image)
    with tarfile.open(tmp_path / "images" / "s.tar", "w") as archive:
        archive.add(image, "cats/1.jpg")
    record = Record((name,), (Message("user", "What is it?"),), ("a cat",), "row 0")
    path = rewarded_image(record, tmp_path / "images")
    assert Path(path.partition("#")[0]).is_file()
    assert clip_reward._read_image(path, record.id) == image.read_bytes()


# ---- options ----


@pytest.mark.parametrize(
    ("text", "options", "named"),
    [
        ("clipscore", RewardOptions(), "--reward_clip"),
        ("qa", RewardOptions(), "--reward_endpoint"),
        ("qa", RewardOptions(endpoint="http://127.0.0.1/v1"), "--reward_endpoint_model"),
        ("cider", RewardOptions(clip="folder"), "--reward_clip"),
        ("os:getcwd", RewardOptions(workers=-1), "--reward_workers"),
        ("cider", RewardOptions(timeout=math.nan), "--reward_timeout"),
        ("cider", RewardOptions(timeout=math.inf), "--reward_timeout"),
        ("cider", RewardOptions(tries=0), "--reward_tries"),
    ],
)
def test_options_of_rewards_are_checked(text: str, options: RewardOptions, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Reward(text, REFERENCES, options)
