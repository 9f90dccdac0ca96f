"""The model `llava_simplified` of lmms-eval, which evaluates a checkpoint on lmms-eval's tasks.

    lmms-eval --model llava_simplified --model_args pretrained=output/cc3m --tasks coco2017_cap_val --batch_size 16

lmms-eval (0.7) builds the prompts, loads the data and computes the scores. It passes three kinds of requests to the
model, each a tuple:

    generate_until              (text, options, images, document, task, split)
    generate_until_multi_round  (text, options, images, next text, document, task, split)
    loglikelihood               (text, answer, images, document, task, split)

`document` is the number of a document in `task_dict[task][split]`, and `images` is a function that returns the images of
a document. The text is rendered with the checkpoint's own prompt template, exactly as `Llava.caption` renders an
instruction.

Only lmms-eval imports this module. The package itself does not depend on lmms-eval.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from tqdm import tqdm

from llava_simplified.data.images import load_pixels
from llava_simplified.data.records import insert_image_placeholders
from llava_simplified.model.answer_scores import Question, score_answers
from llava_simplified.model.generation import (
    count_prompt_tokens,
    generate,
    limit_new_tokens,
    max_context_of,
)
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IMAGE_PLACEHOLDER, Message, count_images

logger = logging.getLogger(__name__)

# Limit for requests that set none. The models of lmms-eval itself have the same default.
DEFAULT_MAX_NEW_TOKENS = 1024

# Options of lmms-eval's tasks that have the same name and meaning in `GenerationOptions`.
_SAME_OPTIONS = ("min_new_tokens", "num_beams", "length_penalty", "repetition_penalty")
# Options that `_parse_options` converts.
_CONVERTED_OPTIONS = (
    "until",
    "max_new_tokens",
    "max_gen_toks",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
)
_KNOWN_OPTIONS = {*_SAME_OPTIONS, *_CONVERTED_OPTIONS}


class PromptSource(NamedTuple):
    """The fields of a request that determine its prompt. Requests with equal sources have the same prompt and images.

    Attributes:
        context: The text of the user turn.
        doc_to_visual: Function that returns the images of a document; None in a request without a document.
        doc_id: Number of the document in its split.
        task: Name of the document's task.
        split: Name of the document's split.
    """

    context: str
    doc_to_visual: Callable[[Any], Any] | None = None
    doc_id: int = 0
    task: str = ""
    split: str = ""

    @property
    def name(self) -> str:
        """The request's name in error messages and warnings."""
        if not self.task:
            return "request without image"
        return f"task {self.task}, document {self.doc_id}"


class GenerationJob(NamedTuple):
    """A prompt, with the options for generating answers to it.

    Attributes:
        source: The prompt.
        options: Generation options. `num_return_sequences` is the number of equal requests that the job answers.
        until: Texts at which the answer ends.
    """

    source: PromptSource
    options: GenerationOptions
    until: tuple[str, ...]


class LlavaSimplified(lmms):  # type: ignore[misc, unused-ignore]
    """A checkpoint of LLaVA Simplified as a model of lmms-eval.

    Args:
        pretrained: Folder of the checkpoint.
        batch_size: Number of prompts to process at a time; lmms-eval's option `--batch_size`.
        device: Device of the model; by default the accelerator of this process if there is one.
        max_batch_size: Ignored; lmms-eval passes it to every model.
        **options: Other options of `llava_simplified.model.checkpoint.load_checkpoint`: dtype, bits, model_base, ...
    """

    # lmms-eval then sends the requests in the module's docstring. Its other kind of model ("chat") gets chat messages,
    # and cannot compute log-likelihoods.
    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"--batch_size {batch_size}: expected an integer of at least 1")
        self._batch_size = int(batch_size)
        # If several processes were started, each one gets its own accelerator.
        device = device or _device_of_process()
        # lmms-eval converts the values of --model_args: a folder named "7" arrives as a number.
        self.model = Llava.from_pretrained(str(pretrained), device=device, **options)
        # A copy, because lmms-eval reads `device` even after it has deleted the model.
        self._device = self.model.device
        self._warned: set[str] = set()

    @property
    def device(self) -> torch.device:
        """The device on which lmms-eval exchanges results between processes."""
        return self._device

    @property
    def batch_size(self) -> int:
        """Number of prompts to process at a time."""
        return self._batch_size

    # ---- requests ----

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Generate an answer to each request.

        With lmms-eval's option `--repeats`, requests occur several times. Equal requests are answered by several
        sequences of one prompt.

        Args:
            requests: Instances of lmms-eval, see the module's docstring.

        Raises:
            ValueError: An image cannot be read, or a prompt exceeds the model's context. The message names the
                document.
        """
        # All requests share a seed, for two reasons: equal requests must have equal options, to become one job, and
        # the answers must not depend on the batch size.
        seed = _draw_seed()
        repetitions: dict[GenerationJob, list[int]] = {}
        for index, request in enumerate(requests):
            context, gen_kwargs, *source = request.args
            options, until = self._parse_options(gen_kwargs, seed)
            job = GenerationJob(PromptSource(context, *source), options, until)
            repetitions.setdefault(job, []).append(index)

        answers = [""] * len(requests)
        jobs = list(repetitions)
        for batch in self._batches(jobs, "Generate"):
            repeated: list[GenerationJob] = []
            for job in batch:
                repeated.append(_repeat(job, times=len(repetitions[job])))
            for job, texts in zip(batch, self._generate_batch(repeated)):
                indices = repetitions[job]
                # Greedy search generates only one answer, so copy it to all repetitions.
                if len(texts) == 1:
                    texts *= len(indices)
                for index, text in zip(indices, texts):
                    answers[index] = text
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Generate answers to requests of several rounds. The text of a round depends on the earlier answers.

        The task's function `doc_to_text` receives the answers, and returns the images and the text of the next
        round, whether this was the last round, and the answers to keep (it may edit them).

        Args:
            requests: Instances of lmms-eval, see the module's docstring.

        Returns:
            The answers of all rounds, for each request.
        """
        results: list[list[str]] = []
        for (request,) in self._batches(requests, "Generate", batch_size=1):
            context, gen_kwargs, doc_to_visual, doc_to_text, doc_id, task, split = request.args
            options, until = self._parse_options(gen_kwargs, _draw_seed())
            document = self.task_dict[task][split][doc_id]
            answers: list[str] = []
            round_info = None
            for round_idx in count(1):
                source = PromptSource(context, doc_to_visual, doc_id, task, split)
                # One job, which generates one answer.
                [[answer]] = self._generate_batch([GenerationJob(source, options, until)])
                visuals, context, is_finished, answers, round_info = doc_to_text(
                    document,
                    previous_output=[*answers, answer],
                    round_idx=round_idx,
                    previous_round_info=round_info,
                )
                if is_finished:
                    break
                # `PromptSource` expects a function, but the images of the next round are known already.
                doc_to_visual = _constant(visuals)
            results.append(list(answers))
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Return how probable each answer is, and whether greedy search would generate it.

        All answers to the same text and images are scored in one forward pass. The end token is not part of an
        answer.

        lmms-eval has two kinds of tasks that send such requests, and they expect opposite signs:

            kind of task      the answer is                  value                     lmms-eval computes
            multiple choice   a text                         negative log-likelihood   the choice with the lowest value
            loglikelihood     a function of the document     log-likelihood            the perplexity

        Args:
            requests: Instances of lmms-eval, see the module's docstring.

        Raises:
            ValueError: See `generate_until`; or an answer is empty.
        """
        # For each prompt: the numbers of the requests that share it, and their answers.
        answers: dict[PromptSource, list[tuple[int, str]]] = {}
        signs: list[float] = []
        for index, request in enumerate(requests):
            # To normalize scores, lmms-eval also requests choices without their question. Then `rest` is empty: there
            # are neither images nor a document.
            context, continuation, *rest = request.args
            source = PromptSource(context, *rest)
            is_choice = isinstance(continuation, str)
            signs.append(-1.0 if is_choice else 1.0)
            if not is_choice:
                continuation = continuation(self._document(source))
            answers.setdefault(source, []).append((index, str(continuation)))

        # The initial values are all overwritten, because each request is in one of the lists of `answers`.
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch in self._batches(list(answers), "Score"):
            questions = [self._prepare_question(source, answers[source]) for source in batch]
            for source, scores in zip(batch, score_answers(self.model, questions)):
                for (index, _), score in zip(answers[source], scores):
                    results[index] = (signs[index] * score.log_likelihood, score.is_greedy)
        # lmms-eval 0.7 converts a bare tuple to a string, and then fails. A tuple in this object stays a tuple.
        return [GenerationResult(text=result) for result in results]

    # ---- prompts ----

    def _document(self, source: PromptSource) -> Any:
        """Return the document of a request, in the form that the task's functions expect."""
        return self.task_dict[source.task][source.split][source.doc_id]

    def _load(self, source: PromptSource) -> tuple[Sequence[Message], torch.Tensor | None]:
        """Return the user turn, and the pixels of its images, uint8 (images, 3, height, width)."""
        try:
            images = self._load_images(source)
        except ValueError as error:
            raise ValueError(f"{source.name}: {error}") from error
        turn = Message("user", self._match_placeholders(source, len(images)))
        turns = insert_image_placeholders([turn], len(images), source.name)
        return turns, torch.stack(images) if images else None

    def _load_images(self, source: PromptSource) -> list[torch.Tensor]:
        """Return the images of a document, uint8 (3, height, width) each."""
        visuals = None
        if source.doc_to_visual is not None:
            visuals = source.doc_to_visual(self._document(source))
        if visuals is None:
            return []
        if not isinstance(visuals, (list, tuple)):
            visuals = [visuals]
        # To save memory, transform each image before loading the next one. Videos and sounds are not supported:
        # `load_pixels` raises ValueError for them.
        transform = self.model.vision_tower.transform
        return [transform(load_pixels(visual)) for visual in visuals]

    def _match_placeholders(self, source: PromptSource, num_images: int) -> str:
        """Return the text of a request, with one placeholder for each image or with none.

        Without placeholders, `insert_image_placeholders` puts all images before the text.
        """
        placeholders = count_images([Message("user", source.context)])
        if placeholders in (0, num_images):
            return source.context
        # Some tasks mention an image twice, so it is unknown which placeholder belongs to which image.
        self._warn_once(
            f"task {source.task}: placeholders",
            f"{source.name}: the text has {placeholders} {IMAGE_PLACEHOLDER} for {num_images} image(s). The "
            "placeholders are removed, and all images come first, here and in similar texts of this task.",
        )
        return source.context.replace(IMAGE_PLACEHOLDER, "")

    def _prepare_question(
        self, source: PromptSource, answers: Sequence[tuple[int, str]]
    ) -> Question:
        """Return a tokenized prompt, with the tokenized answers to score.

        Args:
            source: The prompt.
            answers: Pairs (number of the request, text of the answer).
        """
        turns, pixel_values = self._load(source)
        # lmms-eval puts a space before each answer. Strip it, because the prompt template adds its own.
        texts = [text.strip() for _, text in answers]
        prefix, ids = self.model.prompt.render_branches(turns, texts, source.name)
        without_end_token = [answer[:-1] for answer in ids]
        # Raise an error for the longest answer here, where the message can name the document.
        longest = max(map(len, without_end_token))
        self._remaining_context(source, prefix.input_ids, answer_tokens=longest)
        return Question(prefix.input_ids, without_end_token, pixel_values)

    def _remaining_context(
        self, source: PromptSource, prompt: list[int], answer_tokens: int
    ) -> int:
        """Return how many tokens fit into the context after a prompt.

        Args:
            source: The request, for the error message.
            prompt: Token ids of the prompt. An image is one id here, which stands for `vision_tower.num_tokens` tokens.
            answer_tokens: Minimum number of tokens after the prompt.

        Raises:
            ValueError: Fewer than `answer_tokens` fit.
        """
        prompt_tokens = count_prompt_tokens(self.model, prompt)
        context = max_context_of(self.model)
        if context is None:
            return sys.maxsize
        if prompt_tokens + answer_tokens > context:
            raise ValueError(
                f"{source.name}: the prompt has {prompt_tokens} tokens and the answer at least {answer_tokens}, but the "
                f"model's context has only {context} tokens. Lower --num_fewshot, or leave the task out."
            )
        return context - prompt_tokens

    # ---- generation ----

    def _generate_batch(self, jobs: Sequence[GenerationJob]) -> list[list[str]]:
        """Return `num_return_sequences` texts for each job."""
        results: list[list[str]] = [[] for _ in jobs]
        # `generate` accepts one set of options for a batch, so group the jobs by their options. Usually, all jobs have
        # the same options and form one group.
        groups: dict[GenerationOptions, list[int]] = {}
        prompts: list[list[int]] = []
        pixels: list[torch.Tensor | None] = []
        for number, job in enumerate(jobs):
            turns, pixel_values = self._load(job.source)
            prompt = self.model.prompt.render(turns, None, job.source.name).input_ids
            max_new_tokens = self._remaining_context(job.source, prompt, answer_tokens=1)
            prompts.append(prompt)
            pixels.append(pixel_values)
            options = limit_new_tokens(job.options, max_new_tokens)
            groups.setdefault(options, []).append(number)

        for options, numbers in groups.items():
            prompts_of_group: list[list[int]] = []
            images: list[torch.Tensor] = []
            for number in numbers:
                prompts_of_group.append(prompts[number])
                pixel_values = pixels[number]
                if pixel_values is not None:
                    images.append(pixel_values)
            # `generate` expects the images of all prompts in one tensor, in the order of their placeholders.
            all_pixels = torch.cat(images) if images else None
            texts = generate(self.model, prompts_of_group, all_pixels, options)
            for number, answers in zip(numbers, texts):
                results[number] = [_cut(answer, jobs[number].until) for answer in answers]
        return results

    def _parse_options(
        self, gen_kwargs: Mapping[str, Any], seed: int = 0
    ) -> tuple[GenerationOptions, tuple[str, ...]]:
        """Convert the options of a task, and return them with the texts that end an answer.

        As in lmms-eval's own models, answers are sampled if `do_sample` is true, or if it is missing and the
        temperature is above 0.
        """
        given = {name: value for name, value in gen_kwargs.items() if value is not None}
        for name in sorted(given.keys() - _KNOWN_OPTIONS):
            self._warn_once(
                f"option {name}",
                f"the task sets the generation option {name}={given[name]!r}, which is not supported and is ignored",
            )
        fields = {name: given[name] for name in _SAME_OPTIONS if name in given}
        limit = given.get("max_new_tokens", given.get("max_gen_toks", DEFAULT_MAX_NEW_TOKENS))
        fields["max_new_tokens"] = int(limit)
        samples = given.get("do_sample", given.get("temperature", 0) > 0)
        if samples:
            fields["seed"] = seed
            fields["temperature"] = given.get("temperature", 1.0)
            # Some tasks write 0 for a top_p that is not set.
            fields["top_p"] = given.get("top_p") or 1.0
            fields["top_k"] = int(given.get("top_k", 0))
        until = given.get("until", ())
        texts = [until] if isinstance(until, str) else list(until)
        return GenerationOptions(**fields), tuple(text for text in texts if text)

    # ---- progress ----

    def _batches(
        self, items: Sequence[Any], description: str, batch_size: int | None = None
    ) -> Iterator[list[Any]]:
        """Yield lists of items, with a progress bar in the first process."""
        size = batch_size or self._batch_size
        with tqdm(total=len(items), desc=description, disable=self.rank != 0) as bar:
            for start in range(0, len(items), size):
                batch = list(items[start : start + size])
                yield batch
                bar.update(len(batch))

    def _warn_once(self, subject: str, message: str) -> None:
        """Log a warning, unless there was one about the same subject."""
        if subject not in self._warned:
            self._warned.add(subject)
            logger.warning("%s", message)


def _device_of_process() -> str | None:
    """Return the accelerator of this process if torchrun or accelerate started several processes; else None."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return None
    return f"{accelerator.type}:{os.environ.get('LOCAL_RANK', 0)}"


def _draw_seed() -> int:
    """Return a seed from torch's random number generator, which lmms-eval seeds with its option --seed."""
    return int(torch.randint(2**31, ()))


def _repeat(job: GenerationJob, times: int) -> GenerationJob:
    """Return a job that samples `times` sequences. A greedy job is returned unchanged: its answers would be equal."""
    if not job.options.temperature:
        return job
    options = replace(job.options, num_return_sequences=times)
    return job._replace(options=options)


def _cut(text: str, until: Sequence[str]) -> str:
    """Return the text before the first of the texts that end an answer."""
    for end in until:
        # Each cut can only shorten the text. The order of the texts matters only if they overlap, such as "ab" and "b".
        text = text.partition(end)[0]
    return text.strip()


def _constant(value: Any) -> Callable[[Any], Any]:
    """Return a function that returns this value for every document."""
    return lambda _: value
