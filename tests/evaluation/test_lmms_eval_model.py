"""The model class for lmms-eval: its texts equal those of `Llava.caption`, its log-likelihoods those of a plain loop.

If lmms-eval is not installed, stand-ins replace the two classes that the model requires. The last test runs lmms-eval
itself.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from tiny import save_llava

from llava_simplified.data.collate import expand_image_placeholders
from llava_simplified.evaluation import lmms_eval_plugin
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import Message

HAS_LMMS_EVAL = find_spec("lmms_eval") is not None
CHOICES = ["a red car", "two dogs run over a green field", "a"]
QUESTION = "What is this?"


class StandIn:
    """The part of `lmms_eval.api.model.lmms` that the model uses."""

    def __init__(self) -> None:
        self.rank = 0
        self.task_dict: dict[str, Any] = {}


class StandInResult(NamedTuple):
    """The part of `lmms_eval.api.instance.GenerationResult` that the model uses."""

    text: Any


@pytest.fixture(scope="module")
def model_class() -> Iterator[Any]:
    """The class of the model, imported with lmms-eval or with the stand-ins."""
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_LMMS_EVAL:
            names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.api.instance")
            modules: dict[str, Any] = {name: ModuleType(name) for name in names}
            modules["lmms_eval.api.model"].lmms = StandIn
            modules["lmms_eval.api.instance"].GenerationResult = StandInResult
            for name, module in modules.items():
                patch.setitem(sys.modules, name, module)
        from llava_simplified.evaluation.lmms_eval_model import LlavaSimplified

        yield LlavaSimplified
        if not HAS_LMMS_EVAL:
            del sys.modules[LlavaSimplified.__module__]


@pytest.fixture(scope="module")
def checkpoint(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(models_folder, tmp_path_factory.mktemp("lmms") / "tiny", "llama")


@pytest.fixture(scope="module")
def images(photos: list[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(photo)).convert("RGB") for photo in photos]


@pytest.fixture
def evaluated(model_class: Any, checkpoint: Path, images: list[Image.Image]) -> Any:
    """The model, with a task whose documents have one image and one answer each."""
    evaluated = model_class(str(checkpoint), batch_size=4)
    documents = [{"image": image, "answer": CHOICES[i % 3]} for i, image in enumerate(images)]
    evaluated.task_dict = {"local": {"test": documents}}
    return evaluated


def one_image(document: dict[str, Any]) -> list[Image.Image]:
    return [document["image"]]


def two_images(document: dict[str, Any]) -> list[Image.Image]:
    return [document["image"], document["image"].rotate(90)]


def no_image(document: dict[str, Any]) -> None:
    return None


def request(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def generate(
    evaluated: Any, context: str, doc_ids: Any, visual: Any = one_image, **options: Any
) -> list[str]:
    options = {"max_new_tokens": 8, **options}
    return evaluated.generate_until(
        [request(context, dict(options), visual, i, "local", "test") for i in doc_ids]
    )


@torch.no_grad()
def plain_log_likelihood(model: Llava, text: str, images: list[Image.Image], answer: str) -> float:
    """Score one answer in a separate sequence, without its end token."""
    turns = [Message("user", "<image>\n" * len(images) + text)]
    ids = model.prompt.render(turns, answer).input_ids[:-1]
    prompt = model.prompt.render(turns, None).input_ids
    features = None
    if images:
        _, pixels = model.prepare_inputs(text, images)
        assert pixels is not None
        features = model.vision_tower(pixels)
    expanded = torch.from_numpy(expand_image_placeholders(ids, model.vision_tower.num_tokens))
    embeds = model.splice(expanded[None], features)
    scores = model.language_model(inputs_embeds=embeds).logits[0].log_softmax(-1)
    length = len(ids) - len(prompt)
    target = torch.tensor(ids[-length:])
    return scores[-length - 1 : -1].gather(1, target[:, None]).sum().item()


# ---- texts ----


def test_texts_equal_caption(evaluated: Any, images: list[Image.Image]) -> None:
    answers = generate(evaluated, QUESTION, range(20))
    assert answers == evaluated.model.caption(images, QUESTION, max_new_tokens=8)
    assert len(set(answers)) > 5


def test_texts_of_several_images_and_of_none_equal_chat(
    evaluated: Any, images: list[Image.Image]
) -> None:
    chat = evaluated.model.chat
    [answer] = generate(evaluated, QUESTION, [3], two_images)
    assert answer == chat(QUESTION, two_images({"image": images[3]}), max_new_tokens=8)
    placed = "First <image>, then <image>."
    [answer] = generate(evaluated, placed, [3], two_images)
    assert answer == chat(placed, two_images({"image": images[3]}), max_new_tokens=8)
    [answer] = generate(evaluated, QUESTION, [3], no_image)
    assert answer == chat(QUESTION, max_new_tokens=8)


def test_placeholders_that_do_not_match_are_removed_with_a_warning(
    evaluated: Any, images: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    answers = generate(evaluated, "<image>, <image> and <image>?", [0, 1], two_images)
    expected = evaluated.model.chat(",  and ?", two_images({"image": images[0]}), max_new_tokens=8)
    assert answers[0] == expected
    [record] = caplog.records
    assert "document 0" in record.getMessage()


def test_answers_end_at_the_first_stop_text(evaluated: Any) -> None:
    [whole] = generate(evaluated, QUESTION, [0], max_new_tokens=12)
    middle = whole[4:6]
    for until in (middle, [whole[8:], middle], [middle, ""]):
        [answer] = generate(evaluated, QUESTION, [0], until=until, max_new_tokens=12)
        assert answer == whole[: whole.find(middle)].strip()


def test_repeated_requests_are_samples_of_one_prompt(evaluated: Any) -> None:
    options = {"temperature": 1.5, "do_sample": True}
    torch.manual_seed(1)
    answers = generate(evaluated, QUESTION, [0, 0, 0, 1], **options)
    assert len(set(answers)) == 4
    torch.manual_seed(1)
    evaluated._batch_size = 1
    assert generate(evaluated, QUESTION, [0, 0, 0, 1], **options) == answers
    greedy = generate(evaluated, QUESTION, [0, 0, 0, 1])
    assert greedy[0] == greedy[1] == greedy[2] != greedy[3]


def test_options_of_tasks_are_applied(evaluated: Any, caplog: pytest.LogCaptureFixture) -> None:
    parse = evaluated._parse_options
    # lmms-eval's own models ignore a temperature without sampling.
    greedy, until = parse({"do_sample": False, "temperature": 0.7, "top_p": 0, "until": None})
    assert (greedy.temperature, greedy.top_p, greedy.max_new_tokens, until) == (0, 1, 1024, ())
    sampled, _ = parse({"do_sample": True, "top_p": 0.9, "max_gen_toks": 7, "num_beams": 1})
    assert (sampled.temperature, sampled.top_p, sampled.max_new_tokens) == (1, 0.9, 7)
    assert not caplog.records
    parse({"image_aspect_ratio": "original"})
    parse({"image_aspect_ratio": "original"})
    [record] = caplog.records
    assert "image_aspect_ratio" in record.getMessage()


def test_answers_end_where_the_context_is_full(evaluated: Any) -> None:
    [short] = generate(evaluated, QUESTION, [0], max_new_tokens=3)
    turns = [Message("user", f"<image>\n{QUESTION}")]
    prompt = evaluated.model.prompt.render(turns, None).input_ids
    length = len(prompt) - 1 + evaluated.model.vision_tower.num_tokens
    evaluated.model.config.max_position_embeddings = length + 3
    assert generate(evaluated, QUESTION, [0], max_new_tokens=5000) == [short]
    evaluated.model.config.max_position_embeddings = length
    with pytest.raises(ValueError, match="task local, document 5.*num_fewshot"):
        generate(evaluated, QUESTION, [5])


@pytest.mark.parametrize("visual", ["clip.mp4", {"array": [0.0], "sampling_rate": 16000}])
def test_other_media_are_an_error_that_names_the_document(evaluated: Any, visual: Any) -> None:
    with pytest.raises(ValueError, match="document 7"):
        generate(evaluated, QUESTION, [7], lambda _: [visual])


def test_rounds_continue_until_the_task_ends_them(
    evaluated: Any, images: list[Image.Image]
) -> None:
    def next_text(_: Any, previous_output: list[str], round_idx: int, **__: Any) -> Any:
        if round_idx == 2:
            return None, None, True, previous_output, None
        return [images[1]], f"And this, after {len(previous_output)}?", False, previous_output, None

    arguments = (QUESTION, {"max_new_tokens": 6}, one_image, next_text, 0, "local", "test")
    [answers] = evaluated.generate_until_multi_round([request(*arguments)])
    caption = evaluated.model.caption
    assert answers == [
        caption(images[0], QUESTION, max_new_tokens=6),
        caption(images[1], "And this, after 1?", max_new_tokens=6),
    ]


# ---- log-likelihoods ----


def test_choices_are_scored_as_losses_and_answers_as_log_likelihoods(
    evaluated: Any, images: list[Image.Image]
) -> None:
    evaluated.model.double()
    requests = []
    expected = []
    # Interleave the requests, so that the results must be put back in their order.
    for choice in CHOICES:
        for doc_id in range(6):
            place = (doc_id, "local", "test")
            requests.append(request(QUESTION, f" {choice}", one_image, *place))
            expected.append(
                -plain_log_likelihood(evaluated.model, QUESTION, [images[doc_id]], choice)
            )
    requests.append(
        request(QUESTION, lambda document: document["answer"], two_images, 1, "local", "test")
    )
    both = two_images({"image": images[1]})
    expected.append(plain_log_likelihood(evaluated.model, QUESTION, both, CHOICES[1]))
    # The unconditional requests of multiple choice have no document.
    requests.append(request("", CHOICES[0]))
    expected.append(-plain_log_likelihood(evaluated.model, "", [], CHOICES[0]))
    results = evaluated.loglikelihood(requests)
    assert [result.text[0] for result in results] == pytest.approx(expected, abs=1e-9)


def test_generated_answer_is_greedy(evaluated: Any) -> None:
    [answer] = generate(evaluated, QUESTION, [0], max_new_tokens=3)
    place = (one_image, 0, "local", "test")
    # Tokenizing a generated text does not always give the tokens that were generated.
    results = evaluated.loglikelihood(
        [request(QUESTION, text, *place) for text in (answer, CHOICES[1])]
    )
    ids = evaluated.model.prompt.render([Message("user", "x")], answer).input_ids
    if evaluated.model.prompt.decode(ids[-4:-1]) == answer:
        assert results[0].text[1]
    assert not results[1].text[1]


def test_empty_answer_is_an_error_that_names_the_document(evaluated: Any) -> None:
    with pytest.raises(ValueError, match="document 4"):
        evaluated.loglikelihood([request(QUESTION, " ", one_image, 4, "local", "test")])


def test_batch_size_is_checked(model_class: Any, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="--batch_size auto"):
        model_class(str(checkpoint), batch_size="auto")


# ---- lmms-eval itself ----


def test_entry_point_leads_to_an_existing_class() -> None:
    """pyproject.toml names the function that returns the manifest, and the manifest names the class of the model."""
    module, _, name = lmms_eval_plugin.MODEL_CLASS.rpartition(".")
    source = find_spec(module)
    assert source is not None
    assert source.origin is not None
    assert f"class {name}(" in Path(source.origin).read_text(encoding="utf-8")
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"{lmms_eval_plugin.__name__}:{lmms_eval_plugin.model_manifest.__name__}"' in text


TASK = """
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {output_type}
doc_to_visual: image
doc_to_text: question
doc_to_target: answer
{rest}
"""
CAPTION_TASK = """
generation_kwargs:
  max_new_tokens: 8
  until: []
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOICE_TASK = """
doc_to_choice: ["a red car", "two dogs run over a green field", "a"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def tasks(tmp_path: Path, photos: list[bytes], checkpoint: Path, images: list[Image.Image]) -> Path:
    """A folder of two tasks. Half of the reference captions equal those that the model generates."""
    datasets = pytest.importorskip("datasets")
    captions = Llava.from_pretrained(checkpoint).caption(images, QUESTION, max_new_tokens=8)
    answers = [text if i % 2 else "something else" for i, text in enumerate(captions)]
    for task, column in (("local_captions", answers), ("local_choices", [0, 1, 2, 1] * 5)):
        rows = datasets.Dataset.from_dict(
            {
                "image": [{"bytes": photo, "path": None} for photo in photos],
                "question": [QUESTION] * 20,
                "answer": column,
            }
        )
        rows = rows.cast_column("image", datasets.Image())
        rows.to_parquet(str(tmp_path / f"{task}.parquet"))
    for task, output_type, rest in (
        ("local_captions", "generate_until", CAPTION_TASK),
        ("local_choices", "multiple_choice", CHOICE_TASK),
    ):
        data = tmp_path / f"{task}.parquet"
        text = TASK.format(task=task, data=data, output_type=output_type, rest=rest)
        (tmp_path / f"{task}.yaml").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LMMS_EVAL, reason="lmms-eval is not installed")
def test_lmms_eval_scores_local_tasks(
    tasks: Path,
    checkpoint: Path,
    images: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Captions and multiple choice, as `lmms-eval --model llava_simplified` scores them."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tasks / "cache"))
    if not entry_points(group="lmms_eval.models"):  # the package is not installed, only on the path
        MODEL_REGISTRY_V2.register_manifest(lmms_eval_plugin.model_manifest())
    results = simple_evaluate(
        model="llava_simplified",
        model_args=f"pretrained={checkpoint}",
        tasks=["local_captions", "local_choices"],
        batch_size="6",
        device="cpu",
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    scores = results["results"]
    (tasks / "results.json").write_text(json.dumps(scores, default=str), encoding="utf-8")
    assert scores["local_captions"]["exact_match,none"] == pytest.approx(0.5, abs=1e-6)

    model = Llava.from_pretrained(checkpoint)
    correct = 0
    correct_by_length = 0
    for image, answer in zip(images, [0, 1, 2, 1] * 5):
        values = [plain_log_likelihood(model, QUESTION, [image], choice) for choice in CHOICES]
        by_length = [value / len(choice) for value, choice in zip(values, CHOICES)]
        correct += values.index(max(values)) == answer
        correct_by_length += by_length.index(max(by_length)) == answer
    assert scores["local_choices"]["acc,none"] == pytest.approx(correct / 20, abs=1e-6)
    assert scores["local_choices"]["acc_norm,none"] == pytest.approx(
        correct_by_length / 20, abs=1e-6
    )
