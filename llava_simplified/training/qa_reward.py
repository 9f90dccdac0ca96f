"""Question answering as a reward: a caption is good if it suffices to answer questions about the image.

    record                                  a text-only model, on a server with OpenAI's API
    {"multiple_choice": [{...}, ...]}
        |                                   Description: a red car at night
        +-- question, options shuffled -->  What color is the car?  A. blue  B. red      --> "B"

The reward is the share of correct answers. The model is not given the image, so it can only find an answer in the caption,
or guess it. The idea comes from CapRL (Xing et al., 2025, arXiv:2509.22647).
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from string import ascii_uppercase
from typing import NamedTuple

from llava_simplified.captioning.endpoint_client import (
    SERVER_FAILURES,
    EndpointClient,
    EndpointError,
    RecordError,
)
from llava_simplified.captioning.endpoint_options import EndpointOptions
from llava_simplified.data.records import Question
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.workers import event_loop

PROMPT = """Here is a description of an image:

{caption}

Answer a question about the image, from this description alone. If it does not say, choose the most likely answer.

{question}
{options}

Reply with the letter of the answer only."""
# Some models write a few words or a bracket before the letter. Models that reason before they answer need more tokens
# than this, and are not supported.
MAX_ANSWER_TOKENS = 16
_LETTER = re.compile(r"\b([A-Z])\b")


class Task(NamedTuple):
    """One question about one caption."""

    caption_index: int
    record_id: str
    caption: str
    question: Question
    order: list[int]  # indices of the options, in the order in which they are shown


class QaReward:
    """Score captions by the questions that a text-only model answers correctly from them.

    Args:
        endpoint: The server.
        tries: How often each question is asked, each time with its options in a new random order, because models prefer
            some letters.
        seed: Seed of the orders.
        counts: Counter that is updated. "questions" counts the questions that were asked. "questions_unanswered" counts
            those that the model refused or answered without a letter, which are scored as wrong.
    """

    def __init__(
        self, endpoint: EndpointOptions, tries: int, seed: int, counts: Counter[str]
    ) -> None:
        self._endpoint = endpoint
        self._tries = tries
        self._seed = seed
        self._options = GenerationOptions(max_new_tokens=MAX_ANSWER_TOKENS, temperature=0.0)
        self._counts = counts

    def __call__(
        self,
        ids: Sequence[str],
        questions: Sequence[Sequence[Question]],
        captions: Sequence[str],
    ) -> list[float]:
        """Return the share of correct answers for each caption.

        Args:
            ids: The name of each caption's record.
            questions: The questions of each caption's record.
            captions: The captions.

        Raises:
            ValueError: A record has no questions, or the server fails; the message names the record.
        """
        tasks: list[Task] = []
        for index, (record_id, group, caption) in enumerate(zip(ids, questions, captions)):
            if not group:
                raise ValueError(
                    f"--reward qa: {record_id} has no questions; add them with the key 'multiple_choice'."
                )
            # One task for each question and order of its options. All tasks of the step are sent together.
            for number, question in enumerate(group):
                for attempt in range(self._tries):
                    order = self._shuffle(record_id, number, attempt, len(question.options))
                    tasks.append(Task(index, record_id, caption, question, order))
        self._counts["questions"] += len(tasks)
        with event_loop(self._endpoint.concurrency) as loop:
            are_right = loop.run_until_complete(self._ask_all(tasks))
        right = [0] * len(captions)
        asked = [0] * len(captions)
        for task, is_right in zip(tasks, are_right):
            right[task.caption_index] += is_right
            asked[task.caption_index] += 1
        return [count / total for count, total in zip(right, asked)]

    def _shuffle(self, record_id: str, number: int, attempt: int, count: int) -> list[int]:
        """Return an order of the options.

        All captions of a record get the same order, because their rewards are compared. A resumed run also gets the
        same order.
        """
        key = f"{self._seed}|{record_id}|{number}|{attempt}"
        # Do not use `hash()` as the seed: it differs between processes.
        order = list(range(count))
        random.Random(hashlib.sha256(key.encode()).digest()).shuffle(order)
        return order

    async def _ask_all(self, tasks: Sequence[Task]) -> list[bool]:
        """Send all questions concurrently, and return whether each was answered correctly."""
        async with EndpointClient(self._endpoint, self._options) as client:
            # The client limits the number of requests in flight. After an error, the others are cancelled.
            running = [asyncio.ensure_future(self._ask(client, task)) for task in tasks]
            try:
                return await asyncio.gather(*running)
            finally:
                for future in running:
                    future.cancel()

    async def _ask(self, client: EndpointClient, task: Task) -> bool:
        """Return whether the model answers correctly."""
        lines = []
        for shown_letter, option in zip(ascii_uppercase, task.order):
            lines.append(f"{shown_letter}. {task.question.options[option]}")
        text = PROMPT.format(
            caption=task.caption, question=task.question.text, options="\n".join(lines)
        )
        try:
            choices = await client.complete([{"role": "user", "content": text}])
        except RecordError as error:
            # If the server fails or rejects the request, the caption is not at fault, so the run ends. If the model
            # refuses to answer, that counts as a wrong answer.
            if error.kind in SERVER_FAILURES or error.kind == "rejected":
                raise ValueError(f"--reward qa: {task.record_id}: {error}") from error
            self._counts["questions_unanswered"] += 1
            return False
        except EndpointError as error:
            raise ValueError(f"--reward qa: {task.record_id}: {error}") from error
        # The options were shuffled: the letter is the position at which the correct one was shown.
        right_letter = ascii_uppercase[task.order.index(task.question.answer)]
        letter = find_letter(choices[0].text, len(lines))
        if letter is None:
            self._counts["questions_unanswered"] += 1
            return False
        return letter == right_letter


def find_letter(text: str, count: int) -> str | None:
    """Return the letter of an answer: "B", "(B)", "B. red" or "The answer is B"; None if there is none.

    Args:
        text: The answer.
        count: Number of options.
    """
    letters = ascii_uppercase[:count]
    found = [letter for letter in _LETTER.findall(text) if letter in letters]
    if not found:
        return None
    # Return a letter at the beginning if there is one, otherwise the last letter: in between, "A" can be an article.
    first = text.lstrip("([{*\"' ")
    return first[0] if _LETTER.match(first) and first[0] in letters else found[-1]
