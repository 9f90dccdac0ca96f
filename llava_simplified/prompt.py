"""Text and `<image>` -> token ids and labels. The only place that renders a prompt.

Training, evaluation, prediction and the web page all come here, so a model is asked exactly as it was
taught. The labels are right by construction, not by searching for the answer in a finished text:

1. The chat template is rendered once for each sequence of roles, with a mark in place of every text.
2. The result is cut at the marks. What the template wrote is parsed for control tokens (`<|im_start|>`,
   `[INST]`); what takes the place of a mark, the data, never is: a caption "</s>" is four characters.
3. The prompt ends where the answer begins. The answer is encoded on its own and closed with the template's
   end token: these ids are trained, nothing else. Generation starts from the very same prompt ids.

For ordinary text the ids equal `tokenizer.apply_chat_template`'s. tests/test_prompt.py is the specification.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from uuid import uuid4

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IGNORE_INDEX = -100  # the label of a token that is not trained
IMAGE_INDEX = (
    -200
)  # stands in input_ids for one image, until batching makes room for its patch features
IMAGE_PLACEHOLDER = "<image>"

# Templates of our own. plain: for base models, which have no chat template, the form of Vicuna v1. bare: no roles at all,
# one text under the other, a third of the tokens; what LLaVA trains its projector on in the first stage.
TEMPLATES = {
    "plain": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'system' %}{{ message.content + ' ' }}"
        "{% elif message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "bare": (
        "{{ bos_token }}{% for message in messages %}{{ message.content }}"
        "{{ eos_token if message.role == 'assistant' else '\\n' }}{% endfor %}"
    ),
}
# Some templates write today's date. A model must not be asked tomorrow otherwise than it was trained today,
# so the date stands still, at the day Llama-3 itself falls back to. The macro hides a function of that name.
FIXED_DATE = "{%- macro strftime_now(format) %}{{ '2024-07-26' if '-' in format else '26 Jul 2024' }}{% endmacro -%}"


class Message(NamedTuple):
    role: Literal["system", "user", "assistant"]
    content: str


class TokenizedPrompt(NamedTuple):
    """One sequence, two lists of the same length. A label is the id itself where that is trained,
    IGNORE_INDEX elsewhere, and is not shifted. IMAGE_INDEX stands in `input_ids` once for each image."""

    input_ids: list[int]
    labels: list[int]


class Slot(NamedTuple):
    """The place of the text of one turn, and of its end token if that is an answer. `lead` is the space
    before an answer. It belongs to the answer's first token ("▁a", "Ġa"), not to the prompt's end."""

    turn: int
    lead: str = ""


Part: TypeAlias = (
    "int | str | Slot"  # of a rendered template: control token, the template's own text, data
)


class Layout(NamedTuple):
    prefix: list[Part]  # what stands before the last answer
    answer: Slot


def count_images(turns: Sequence[Message]) -> int:
    """How many images the turns ask for: `<image>` counts in the user's text; anywhere else it is text."""
    return sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")


class Prompt:
    """The renderer for one tokenizer (one that has a `backend_tokenizer` of the tokenizers library).

    `template`: "chat" is the tokenizer's own, "plain" is `USER: ... ASSISTANT: ...`, "bare" has no roles, "auto" is
    chat where there is one, else plain; `name` tells which. `end_id` closes every answer and is trained; generation
    stops at any of `stop_ids`. Raises ValueError where the tokenizer cannot serve.
    """

    def __init__(self, tokenizer: Any, template: str = "auto") -> None:
        if template not in ("auto", "chat", *TEMPLATES):
            raise ValueError(
                f"unknown prompt template {template!r}: choose auto, chat, plain or bare"
            )
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no tokenizer.json behind it: convert it first"
            )
        if template == "chat" and not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: choose the plain one")
        self.name = template
        if template == "auto":
            self.name = "chat" if tokenizer.chat_template else "plain"
        self._template = FIXED_DATE + (TEMPLATES.get(self.name) or tokenizer.get_chat_template())
        self._tokenizer = tokenizer
        self._layouts: dict[tuple[str, ...], Layout] = {}

        # Two encoders that know no control tokens, so that data cannot inject one: for text after a control
        # token, played by the anchor, and for text inside text, where a tokenizer must add no first space.
        self._anchor = f"⟦{uuid4()}⟧"
        self._text, self._inner_text = _text_encoder(backend), _text_encoder(backend, inner=True)
        self._text.add_special_tokens([self._anchor])

        added = backend.get_added_tokens_decoder()
        self._control_ids: dict[str, int] = {token.content: i for i, token in added.items()}
        longest_first = sorted(added.values(), key=lambda token: len(token.content), reverse=True)
        control = "|".join(
            r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip
            for token in longest_first
        )
        tail = self._apply_template(("user", "assistant"), "").partition("⟦assistant 1⟧")[2]
        match = re.match(rf"\s*({control})", tail) if control else None
        end = match[1] if match else tokenizer.eos_token
        if end is None:
            raise ValueError(
                "neither the template nor the tokenizer has a token that ends an answer"
            )
        self.end_id = self._control_id(end)
        self.stop_ids: list[int] = sorted({self.end_id, tokenizer.eos_token_id} - {None})
        # Text between an answer and its end token (Llama-2 has a space there) is dropped: left untrained, the
        # model would not learn to stop; trained, it would not be the caption.
        self._parts = re.compile(
            rf"(?P<lead> *)⟦assistant (?P<answer>\d+)⟧(?:\s*{re.escape(end)})?"
            rf"|⟦(?:system|user) (?P<question>\d+)⟧|(?P<control>{control or '(?!)'})"
        )
        self._lead = self._layout([Message("user", "")], "").answer.lead

    def usable_tokens(self) -> dict[int, str]:
        """The ids that prompts and answers can contain, with their tokens: those of texts and the template's own.

        Other control tokens never occur: they are not parsed in data."""
        backend = self._tokenizer.backend_tokenizer
        tokens = {i: token for token, i in backend.get_vocab(with_added_tokens=False).items()}
        roles = [Message("user", ""), Message("assistant", ""), Message("user", "")]
        parts = self._layout(roles, "").prefix
        for part in [*parts, self.end_id]:
            if isinstance(part, int):
                tokens[part] = str(self._tokenizer.convert_ids_to_tokens(part))
        return tokens

    def max_expansion(self) -> float:
        """How many times longer a text can become, in bytes, before it is cut into tokens."""
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        if normalizer is None:
            return 1.0
        longest = "\N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}"  # 18 letters in the forms NFKC and NFKD
        return max(1.0, len(normalizer.normalize_str(longest).encode()) / len(longest.encode()))

    def render(
        self, turns: Sequence[Message], response: str | None, where: str = ""
    ) -> TokenizedPrompt:
        """The training sequence; with `response` None the generation prompt, which is exactly its beginning.

        Trained are the response, the earlier assistant turns, and the end token of each. `where` names the
        record in errors. Raises ValueError for turns out of order and for an answer without text.
        """
        if response is None:
            ids = self._prefix(turns, where).input_ids
            return TokenizedPrompt(ids, [IGNORE_INDEX] * len(ids))
        prefix, (branch,) = self.render_branches(turns, [response], where)
        return TokenizedPrompt(prefix.input_ids + branch, prefix.labels + branch)

    def render_branches(
        self, turns: Sequence[Message], responses: Sequence[str], where: str = ""
    ) -> tuple[TokenizedPrompt, list[list[int]]]:
        """Several answers to the same turns: the shared prompt once, and each answer's trained ids with the
        end token. The prompt and one of them are what `render` gives."""
        slot = self._layout(turns, where).answer
        return self._prefix(turns, where), [
            self._answer_ids(slot, text, where) for text in responses
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, trained or generated, up to its end token: `render_branches` undone."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        # WHY the x: sentencepiece decoders drop a space at the very beginning, even one that was written.
        decode, x = self._tokenizer.backend_tokenizer.decode, self._inner_text.encode("x").ids
        return decode([*x, *ids[:end]])[len(decode(x)) :].removeprefix(self._lead)

    def _prefix(self, turns: Sequence[Message], where: str) -> TokenizedPrompt:
        """What stands before the last answer. Text between two control tokens is encoded in one piece."""
        ids: list[int] = []
        labels: list[int] = []
        text = ""
        for part in [
            *_fill(self._layout(turns, where).prefix, turns),
            None,
        ]:  # None: the end, for the text before it
            if isinstance(part, str):
                text += part
                continue
            if text:  # behind a control token it is encoded with the anchor, whose own id is left out again
                new = self._encode(self._text, self._anchor + text if ids else text, where)[
                    bool(ids) :
                ]
                ids, labels, text = ids + new, labels + [IGNORE_INDEX] * len(new), ""
            if isinstance(part, Slot):
                new = self._answer_ids(part, turns[part.turn].content, where)
                ids, labels = ids + new, labels + new
            elif part is not None:
                ids, labels = [*ids, part], [*labels, IGNORE_INDEX]
        return TokenizedPrompt(ids, labels)

    def _answer_ids(self, slot: Slot, text: str, where: str) -> list[int]:
        ids = self._encode(self._inner_text, slot.lead + text, where)
        if not text.strip() or not ids:
            raise ValueError(
                _at(where) + "the answer is empty: give it a text or leave the record out"
            )
        return [*ids, self.end_id]

    def _encode(self, encoder: Tokenizer, text: str, where: str) -> list[int]:
        try:
            return encoder.encode(text).ids
        except TypeError as error:  # what the library raises for half of a surrogate pair
            raise ValueError(_at(where) + f"this is not Unicode text: {text!r}") from error

    def _layout(self, turns: Sequence[Message], where: str) -> Layout:
        """The template, rendered for the roles of these turns and an answer, and cut into its parts."""
        roles = (*(turn.role for turn in turns), "assistant")
        if roles in self._layouts:
            return self._layouts[roles]
        if not re.fullmatch("(system )?(user assistant )+", " ".join(roles) + " "):
            order = "at most one system turn, then user and assistant in turn, the user's last"
            raise ValueError(
                _at(where) + f"the roles of the turns are {list(roles[:-1])}, but must be {order}"
            )
        rendered, end = self._apply_template(roles, where), 0
        parts: list[Part] = []
        for match in self._parts.finditer(rendered):
            if match.start() > end:
                parts.append(rendered[end : match.start()])
            end = match.end()
            if match["question"]:
                parts.append(Slot(int(match["question"])))
            elif match["answer"]:
                parts.append(Slot(int(match["answer"]), self._lead_after(parts, match["lead"])))
            else:
                parts.append(self._control_id(match["control"]))
        last = next(
            i for i, part in enumerate(parts) if isinstance(part, Slot) and part.turn == len(turns)
        )
        answer = parts[last]
        assert isinstance(answer, Slot)
        return self._layouts.setdefault(roles, Layout(parts[:last], answer))

    def _lead_after(self, parts: Sequence[Part], lead: str) -> str:
        """The template's space before an answer and, right after a control token, the tokenizer's own."""
        if parts and isinstance(parts[-1], int):
            ids = self._text.encode(f"{self._anchor}{lead}x").ids[1:]
            return lead if ids == self._inner_text.encode(f"{lead}x").ids else " " + lead
        return lead

    def _control_id(self, matched: str) -> int:
        return self._control_ids[matched if matched in self._control_ids else matched.strip()]

    def _apply_template(self, roles: Sequence[str], where: str) -> str:
        """The template's own rendering, marks in place of texts. Where it knows no system role (Gemma), the
        system's text goes before the first question."""
        from jinja2 import TemplateError

        marks = [f"⟦{role} {turn}⟧" for turn, role in enumerate(roles)]
        attempts = [(roles, marks)]
        if roles[0] == "system":
            attempts.append((roles[1:], [f"{marks[0]}\n\n{marks[1]}", *marks[2:]]))
        for spoken, texts in attempts:
            messages = [{"role": role, "content": text} for role, text in zip(spoken, texts)]
            try:  # enable_thinking is Qwen3's: a caption comes without a thought before it
                rendered: str = self._tokenizer.apply_chat_template(
                    messages, chat_template=self._template, tokenize=False, enable_thinking=False
                )
            except TemplateError as error:
                problem = str(error)
                continue
            if all(rendered.count(mark) == 1 for mark in marks):
                return rendered
            problem = "it leaves out or repeats a turn"
        raise ValueError(
            _at(where)
            + f"the chat template cannot render {list(roles)}: {problem}. Try the plain template"
        )


def _text_encoder(backend: Tokenizer, inner: bool = False) -> Tokenizer:
    """An encoder with the same vocabulary that parses no control token; `inner` ones add no first space."""
    # WHY not backend.encode with split_special_tokens: Transformers 5 leaves that switch turned in the shared
    # tokenizer, and tokens that were added as "not special" (Qwen3's <think>) are parsed all the same.
    from tokenizers import Tokenizer, models

    encoder = Tokenizer(models.BPE())
    encoder.normalizer, encoder.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    if inner:
        encoder = Tokenizer.from_str(
            json.dumps(json.loads(encoder.to_str(), object_hook=_no_first_space))
        )
    encoder.model = backend.model  # shared, not copied
    return encoder


def _no_first_space(step: dict[str, Any]) -> dict[str, Any]:
    """The three ways in which a tokenizer.json puts a space before the first word, turned off."""
    off = {"prepend_scheme": "never", "add_prefix_space": False}
    if step.get("type") == "Prepend":
        off["prepend"] = ""
    return step | {key: value for key, value in off.items() if key in step}


def _fill(parts: Sequence[Part], turns: Sequence[Message]) -> Iterator[Part]:
    """Put the texts of the questions into their places; an image becomes IMAGE_INDEX."""
    for part in parts:
        if not isinstance(part, Slot) or turns[part.turn].role == "assistant":
            yield part
        elif turns[part.turn].role == "system":
            yield turns[part.turn].content
        else:
            text, *after_images = turns[part.turn].content.split(IMAGE_PLACEHOLDER)
            yield text
            for text in after_images:
                yield from (IMAGE_INDEX, text)


def _at(where: str) -> str:
    return f"{where}: " if where else ""
