"""Text and `<image>` -> token ids and labels. The only place that renders a prompt.

Training, evaluation, captioning and serving all render here, so that a model is prompted exactly as it
was trained.

How labels are made
-------------------

The usual code renders a conversation to text, encodes it, and then searches for the answer in the ids,
to mask the rest. This fails if tokens merge across the boundary, or if data contains a control token.
Here labels are right by construction, because the answer is never searched for:

1. The chat template is rendered once per sequence of roles, with a marker instead of every text:

       <s> [INST] ⟦user 0⟧ [/INST] ⟦assistant 1⟧ </s>

2. The result is split at the markers and at the control tokens. The text of the template is parsed
   for control tokens; the text that replaces a marker (data) is not: a caption "</s>" is four
   characters.

       control   text      slot     text       slot of the answer
       <s>       " [INST] " user 0  " [/INST]"  assistant 1          (and its end token)

3. The slots are filled. All text between two control tokens is encoded together; an image is one
   IMAGE_INDEX. The prompt ends where the answer begins. The answer is encoded separately, and the
   template's end token is appended: only these ids are trained.

       input_ids   <s>  [INST]  -200  What  is  this  ?  [/INST]  a    cat  </s>
       labels      .    .       .     .     .   .     .  .        a    cat  </s>     "." is IGNORE_INDEX

   Generation starts from exactly these prompt ids.

For ordinary text the ids equal those of `tokenizer.apply_chat_template`. tests/test_prompt.py is the
specification.

Where the images are
--------------------

In the data, `<image>` stands for an image. The template of a language model treats it like any other text
and copies it with the text around it. The templates of some stock LLaVA models write an image token
themselves, possibly between other control tokens. The model was trained with this token:

    template of a       content of a question                  image token
    language model      "<image>\nWhat is this?"                none: the image is where `<image>` is
    JoyCaption          "What is this?"                         always, before the text of the first question
    llava-hf            [{"type": "image"}, {"type": "text",    for each image part
                        "text": "What is this?"}]

If the template writes an image token, that token is the placeholder: it becomes IMAGE_INDEX, and `<image>` is
removed from the text, together with one line break on either side. In a question without an image (which stock
processors refuse), the image token stays an ordinary token. The attribute `image_token` of the tokenizer
contains its name; `llava import` sets it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias
from uuid import uuid4

if TYPE_CHECKING:
    import tokenizers

# The label of a token that is not trained (the default `ignore_index` of PyTorch's cross_entropy).
IGNORE_INDEX = -100
# The placeholder of an image in input_ids. Collating repeats it once per patch feature.
IMAGE_INDEX = -200
IMAGE_PLACEHOLDER = "<image>"

# Our own templates. "plain" is the format of Vicuna v1, for base models, which have no chat template.
# "bare" has no roles, only one text per line, and needs a third of the tokens: LLaVA uses this format to
# train its projector in the first stage.
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
# Some templates contain the current date. Fix the date (to the default of Llama 3's own template), so that
# a model always gets the same prompt as in training. Templates get the date from the function `strftime_now`,
# and in Jinja, a macro replaces the function of the same name.
FIXED_DATE = (
    "{%- macro strftime_now(format) %}"
    "{{ '2024-07-26' if '-' in format else '26 Jul 2024' }}"
    "{% endmacro -%}"
)


class Tokenizer(Protocol):
    """The part of a fast tokenizer of Transformers that `Prompt` uses."""

    backend_tokenizer: Any
    chat_template: Any
    name_or_path: str

    @property
    def eos_token(self) -> Any: ...
    @property
    def eos_token_id(self) -> Any: ...
    def get_chat_template(self) -> str: ...
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


class Message(NamedTuple):
    """One turn of a conversation. In a user's turn, `<image>` stands for an image."""

    role: Literal["system", "user", "assistant"]
    content: str


class TokenizedPrompt(NamedTuple):
    """A tokenized prompt or training sequence.

    Attributes:
        input_ids: Token ids, with IMAGE_INDEX once per image.
        labels: One label per token, not shifted: the token's own id if it is trained, else IGNORE_INDEX.
    """

    input_ids: list[int]
    labels: list[int]


class Slot(NamedTuple):
    """The place of a turn's text in a layout. The place of an answer includes the answer's end token.

    Attributes:
        turn: Index of the turn.
        lead: The space before an answer. It is encoded with the first token of the answer ("▁a", "Ġa"),
            and not with the end of the prompt.
        text: Index of this text among the texts of the turn. It is above 0 only in a question that is passed
            to the template as a list of parts, with images between the texts.
    """

    turn: int
    lead: str = ""
    text: int = 0


class ImageSlot(NamedTuple):
    """The place of an image token that the template writes.

    Attributes:
        turn: Index of the user turn (the question) that the image belongs to.
    """

    turn: int


# A part of a rendered template: id of a control token, text of the template, or place of a text or an image.
Part: TypeAlias = "int | str | Slot | ImageSlot"


class Shape(NamedTuple):
    """The properties of a turn that decide how a template renders it: everything except the texts.

    Attributes:
        role: "system", "user" or "assistant".
        parts: The kind of each part, "text" or "image", in order. Always ("text",) if the template accepts
            strings.
    """

    role: str
    parts: tuple[str, ...] = ("text",)


class Layout(NamedTuple):
    """A template, rendered for turns of certain shapes and split into parts.

    Attributes:
        prefix: All parts before the last answer.
        answer: The slot of the last answer.
        image_slots: Number of image slots by index of the turn; 0 for turns without any.
    """

    prefix: list[Part]
    answer: Slot
    image_slots: Counter[int]


def count_images(turns: Sequence[Message]) -> int:
    """Count the image placeholders in user turns. In other turns, `<image>` is ordinary text."""
    return sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")


class Prompt:
    """The renderer of one tokenizer and one template.

    Args:
        tokenizer: A fast tokenizer of Transformers (with a `backend_tokenizer`).
        template: "chat" is the tokenizer's own template, "plain" is `USER: ... ASSISTANT: ...`, "bare"
            has no roles. "auto" is "chat" if the tokenizer has a template, else "plain".

    Attributes:
        name: "chat", "plain" or "bare".
        image_token: The token that the template writes in the place of an image; None if the image is where
            `<image>` is in the text.
        accepts_strings: Whether the template expects the content of a message as a string. Otherwise, it
            expects a list of parts (texts and images).
        end_id: The token that ends every answer, and is trained.
        stop_ids: The tokens at which generation stops: `end_id` and the tokenizer's EOS token.

    Raises:
        ValueError: The tokenizer or its template cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, template: str = "auto") -> None:
        if template not in ("auto", "chat", *TEMPLATES):
            raise ValueError(
                f"unknown prompt template {template!r}; pass --template auto, chat, plain or bare"
            )
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no tokenizer.json. Only fast tokenizers are supported; "
                "convert this tokenizer to a fast one first"
            )
        if template == "chat" and not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; pass --template plain")
        self.name = template
        if template == "auto":
            self.name = "chat" if tokenizer.chat_template else "plain"
        self._template = FIXED_DATE + (TEMPLATES.get(self.name) or tokenizer.get_chat_template())
        self._tokenizer = tokenizer
        self._layouts: dict[tuple[Shape, ...], Layout] = {}

        # Create two encoders without the tokenizer's control tokens, so that data cannot inject any.
        #
        # - `_no_prefix_space_encoder` never adds a space before its text. It encodes answers.
        # - `_anchored_encoder` encodes text that follows a control token. Some tokenizers add a space there and
        #   others do not. To get the tokenizer's own behavior, put the anchor before the text. It is the only
        #   control token of this encoder, and it is random, so that data cannot contain it.
        self._anchor = f"⟦{uuid4()}⟧"
        self._anchored_encoder = _make_encoder(backend)
        self._anchored_encoder.add_special_tokens([self._anchor])
        self._no_prefix_space_encoder = _make_encoder(backend, add_prefix_space=False)

        added_tokens = backend.get_added_tokens_decoder()
        self._control_ids: dict[str, int] = {t.content: i for i, t in added_tokens.items()}
        self._special_ids = {i for i, token in added_tokens.items() if token.special}
        self._byte_ids = _find_byte_tokens(backend)
        self._byte_values = {token: value for value, token in enumerate(self._byte_ids)}
        # The result of `token_texts`, computed on first use because few commands need it.
        self._token_texts: list[bytes] | None = None
        control_pattern = _control_pattern(added_tokens.values())
        self.accepts_strings = self._template_accepts_strings()
        self.image_token = self._find_image_token()
        end = self._find_end_token(control_pattern)
        self.end_id = self._control_id(end)
        stop_ids = {self.end_id, tokenizer.eos_token_id}
        self.stop_ids: list[int] = sorted(stop_ids - {None})

        # Drop whitespace between an answer and its end token (Llama 2 has a space there). If it were in the
        # sequence but not trained, the model would not learn to stop; if it were trained, it would become
        # part of the caption.
        self._part_pattern = re.compile(
            rf"(?P<lead> *)⟦assistant (?P<answer>\d+)⟧(?:\s*{re.escape(end)})?"
            rf"|⟦(?:system|user) (?P<question>\d+)(?:\.(?P<text>\d+))?⟧"
            rf"|(?P<control>{control_pattern or _NEVER_MATCHES})"
        )
        self._lead = self._layout([Message("user", "")], "").answer.lead

    # ---- public ----

    def usable_tokens(self) -> dict[int, str]:
        """Return the ids that prompts and answers can contain, with their tokens.

        These are all text tokens, and the control tokens that the template writes. Other control tokens never occur,
        because their names in data are encoded as ordinary text.
        """
        backend = self._tokenizer.backend_tokenizer
        text_tokens = backend.get_vocab(with_added_tokens=False)
        tokens = {index: token for token, index in text_tokens.items()}
        control_tokens = {index: token for token, index in self._control_ids.items()}
        turns = [Message("user", ""), Message("assistant", ""), Message("user", "")]
        for part in [*self._layout(turns, "").prefix, self.end_id]:
            if isinstance(part, ImageSlot):
                part = self._image_id()
            if isinstance(part, int):
                tokens[part] = control_tokens.get(part, f"token {part}")
        return tokens

    def max_normalizer_growth(self) -> float:
        """Return the largest factor by which the tokenizer's normalizer lengthens a text, in bytes."""
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        if normalizer is None:
            return 1.0
        # This character expands more than any other: NFKC and NFKD turn its 3 bytes into 33.
        character = "\N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}"
        return max(1.0, len(normalizer.normalize_str(character).encode()) / len(character.encode()))

    def render(
        self, turns: Sequence[Message], response: str | None, where: str = ""
    ) -> TokenizedPrompt:
        """Render a training sequence or, without a response, the prompt for generation.

        The prompt for generation is exactly the beginning of the training sequence. The labels contain
        the response, the earlier assistant turns, and the end token of each.

        Args:
            turns: At most one system turn, then alternating user and assistant turns, the last from the
                user.
            response: The answer to the last turn, or None.
            where: Name of the record, for error messages.

        Raises:
            ValueError: The turns are out of order, an answer is empty, the template cannot render the turns, or
                it writes more or fewer image tokens than there are images.
        """
        if response is None:
            ids = self._render_prefix(turns, where, is_trained=False).input_ids
            return TokenizedPrompt(ids, [IGNORE_INDEX] * len(ids))
        prefix, (branch,) = self.render_branches(turns, [response], where)
        return TokenizedPrompt(prefix.input_ids + branch, prefix.labels + branch)

    def render_branches(
        self, turns: Sequence[Message], responses: Sequence[str], where: str = ""
    ) -> tuple[TokenizedPrompt, list[list[int]]]:
        """Render several answers to the same turns.

        Returns:
            The shared prompt, and the ids of each answer with its end token, all of which are trained.
            The prompt and one of the answers together are what `render` returns.
        """
        slot = self._layout(turns, where).answer
        prefix = self._render_prefix(turns, where)
        return prefix, [self._answer_ids(slot, response, where) for response in responses]

    def encode_start(self, text: str) -> list[int]:
        """Return the token ids of the beginning of an answer, which generation continues.

        They are the first ids of an answer that begins with the text, as in training. White space around
        the text is removed: most tokenizers put a space into the token of the word that follows.
        """
        return self._encode(self._no_prefix_space_encoder, self._lead + text.strip(), where="")

    def token_texts(self) -> list[bytes]:
        """Return the text of every token of the vocabulary, as UTF-8 bytes; empty for special tokens.

        The index is the token id. A token may be a part of a character, so its text may be invalid UTF-8.
        Joining the texts of all tokens of an answer gives the answer.
        """
        if self._token_texts is None:
            # Decode each token after an "x", because decoders treat the first token differently (for example,
            # they drop its space).
            self._token_texts = _find_token_texts(
                backend=self._tokenizer.backend_tokenizer,
                before=self._no_prefix_space_encoder.encode("x").ids,
                byte_values=self._byte_values,
                special_ids=self._special_ids,
            )
        return self._token_texts

    def decode(self, ids: Sequence[int], finished: bool = True) -> str:
        """Return the text of an answer up to its end token: the inverse of `render_branches`.

        Args:
            ids: The token ids.
            finished: False if more tokens may follow. A last character whose bytes are incomplete is then left
                out, so that later calls with more tokens only ever append text.

        Returns:
            The text. Bytes that are not valid UTF-8, such as a character that is cut off at the end,
            become one replacement character (U+FFFD); everything around them is decoded.
        """
        answer: list[int] = []
        for token in ids:
            if token in self.stop_ids:
                break
            answer.append(token)
        # Decode the answer after an "x", and remove the "x": sentencepiece decoders drop a space at the
        # very beginning, even if it is part of the text.
        x = self._no_prefix_space_encoder.encode("x").ids
        decode = self._tokenizer.backend_tokenizer.decode
        text: str = decode([*x, *self._replace_invalid_bytes(answer)])[len(decode(x)) :]
        if not finished:
            text = text.rstrip(_REPLACEMENT_CHARACTER)
        return text.removeprefix(self._lead)

    def _replace_invalid_bytes(self, ids: Sequence[int]) -> Sequence[int]:
        """Replace byte tokens that are not valid UTF-8 by the byte tokens of U+FFFD.

        Sentencepiece tokenizers (Llama 2, Mistral, Gemma) spell a character that is not in the
        vocabulary as byte tokens. If one byte of a sequence of byte tokens is wrong or missing, the decoder of
        the tokenizers library replaces all of its bytes, even those of complete characters:

            日 and half of 本      E6 97 A5 E6 9C           decoded as five times U+FFFD
            after replacing it    E6 97 A5 (EF BF BD)      decoded as 日 and one U+FFFD
        """
        if not self._byte_values:
            return ids
        id_to_token = self._tokenizer.backend_tokenizer.id_to_token
        replaced: list[int] = []
        sequence = bytearray()

        def flush() -> None:
            """Append the collected bytes as byte tokens, with U+FFFD instead of invalid ones."""
            valid = sequence.decode(errors="replace").encode()
            replaced.extend(self._byte_ids[value] for value in valid)
            sequence.clear()

        for token in ids:
            if token in self._byte_values:
                sequence.append(self._byte_values[token])
                continue
            # The decoder skips special and unknown tokens, so the bytes before and after them are one sequence.
            if token in self._special_ids or id_to_token(token) is None:
                continue
            flush()
            replaced.append(token)
        flush()
        return replaced

    # ---- layouts: the template, rendered and split ----

    def _layout(self, turns: Sequence[Message], where: str) -> Layout:
        """Return the layout of these turns and an answer to the last one.

        Raises:
            ValueError: The turns are out of order, or the template cannot render them.
        """
        shapes = (*(self._shape(turn) for turn in turns), Shape("assistant"))
        # A data set has few different sequences of shapes, so nearly all layouts come from this cache.
        if shapes in self._layouts:
            return self._layouts[shapes]
        roles = [shape.role for shape in shapes]
        if not re.fullmatch("(system )?(user assistant )+", " ".join(roles) + " "):
            raise ValueError(
                f"{_at(where)}the roles of the turns are {roles[:-1]}; expected at most one system turn, "
                "then alternating user and assistant turns, the last from the user"
            )
        parts = self._cut(self._apply_template(shapes, where))
        for i, part in enumerate(parts):
            if isinstance(part, Slot) and part.turn == len(turns):
                prefix = self._find_image_slots(parts[:i], roles)
                slots = [slot for slot in prefix if isinstance(slot, ImageSlot)]
                image_slots = Counter(slot.turn for slot in slots)
                self._layouts[shapes] = Layout(prefix, part, image_slots)
                return self._layouts[shapes]
        raise AssertionError("unreachable: `_apply_template` returns the marker of every turn")

    def _shape(self, turn: Message) -> Shape:
        """Return the properties of a turn that the rendered template depends on."""
        if self.accepts_strings or self.image_token is None or turn.role != "user":
            return Shape(turn.role)
        parts: list[str] = []
        # There is an image between every two texts. Some of the texts may be empty.
        for number, text in enumerate(_texts_between_images(turn.content)):
            if number > 0:
                parts.append("image")
            if text:
                parts.append("text")
        return Shape(turn.role, tuple(parts) or ("text",))

    def _find_image_slots(self, parts: Sequence[Part], roles: Sequence[str]) -> list[Part]:
        """Replace the image tokens among the parts before the last answer by image slots.

        An image token before the text of a question belongs to that question. One between a question and its
        answer also belongs to the question.
        """
        if self.image_token is None:
            return list(parts)
        found: list[Part] = []
        # Go backward, so that the text after an image token is known. After the last part comes the last answer.
        next_turn = len(roles) - 1
        for part in reversed(parts):
            if isinstance(part, Slot):
                next_turn = part.turn
            if part == self._image_id():
                turn = next_turn
                # Before a system text, the question is the turn after it; before an answer, the turn before it.
                if roles[turn] == "system":
                    turn += 1
                elif roles[turn] == "assistant":
                    turn -= 1
                part = ImageSlot(turn)
            found.append(part)
        return found[::-1]

    def _cut(self, rendered: str) -> list[Part]:
        """Split a rendered template at its markers and control tokens."""
        parts: list[Part] = []
        end = 0
        for match in self._part_pattern.finditer(rendered):
            if match.start() > end:
                parts.append(rendered[end : match.start()])
            end = match.end()
            if match["question"]:
                parts.append(Slot(int(match["question"]), text=int(match["text"] or 0)))
            elif match["answer"]:
                lead = self._answer_lead(parts, match["lead"])
                parts.append(Slot(int(match["answer"]), lead))
            else:
                parts.append(self._control_id(match["control"]))
        return parts

    def _answer_lead(self, parts: Sequence[Part], lead: str) -> str:
        """Return the space before an answer: the template's own, and the one that the tokenizer adds.

        Args:
            parts: The parts of the template before the answer.
            lead: The spaces that the template writes before the answer.
        """
        # The tokenizer adds a space only after a control token (an int), not after text.
        if not parts or not isinstance(parts[-1], int):
            return lead
        # Encode an "x" after the anchor, and drop the anchor's id. If the tokenizer has added a space, the ids
        # differ from the ids of the encoder that never adds one.
        ids = self._anchored_encoder.encode(f"{self._anchor}{lead}x").ids[1:]
        if ids == self._no_prefix_space_encoder.encode(f"{lead}x").ids:
            return lead
        return " " + lead

    def _template_accepts_strings(self) -> bool:
        """Return whether the template accepts a string as the content of a message, or else a list of parts.

        Raises:
            ValueError: The template accepts neither.
        """
        question = (Shape("user"), Shape("assistant"))
        # `_apply_template` reads this attribute. Try both values.
        self.accepts_strings = True
        try:
            self._apply_template(question, "")
        except ValueError as error:
            self.accepts_strings = False
            try:
                self._apply_template(question, "")
            except ValueError:
                raise error from None
        return self.accepts_strings

    def _find_image_token(self) -> str | None:
        """Return the image token of the tokenizer if the template writes it, else None."""
        token = getattr(self._tokenizer, "image_token", None)
        if self.name != "chat" or token not in self._control_ids:
            return None
        question = Shape("user")
        if not self.accepts_strings:
            question = Shape("user", ("image", "text"))
        try:
            rendered = self._apply_template((question, Shape("assistant")), "")
        except ValueError:
            # The template expects lists of parts, but does not support parts of type "image".
            return None
        return token if token in rendered else None

    def _image_id(self) -> int:
        """Return the id of the image token. The template must have one."""
        assert self.image_token is not None
        return self._control_ids[self.image_token]

    def _apply_template(self, shapes: Sequence[Shape], where: str) -> str:
        """Render the template with a marker in place of each text.

        If the template does not support a system role (Gemma), the system text is put before the first
        question.
        """
        roles = [shape.role for shape in shapes]
        contents = [_mark_texts(shape, turn) for turn, shape in enumerate(shapes)]
        markers: list[str] = []
        for content in contents:
            markers += [part["text"] for part in content if part["type"] == "text"]
        attempts = [(roles, contents)]
        if roles[0] == "system":
            attempts.append((roles[1:], _fold_system_text(contents)))
        for attempt_roles, attempt_contents in attempts:
            messages: list[dict[str, Any]] = []
            for role, content in zip(attempt_roles, attempt_contents):
                # A template that accepts strings gets exactly one text.
                text_or_parts = content[0]["text"] if self.accepts_strings else content
                messages.append({"role": role, "content": text_or_parts})
            try:
                rendered: str = self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._template,
                    tokenize=False,
                    # Turn off the reasoning of Qwen 3 and others, which would precede the caption.
                    enable_thinking=False,
                )
            # A template is code of the checkpoint's author, and may raise any exception.
            except Exception as error:  # noqa: BLE001
                problem = f"{type(error).__name__}: {error}"
                continue
            # Some templates silently drop turns, such as the system turn, or repeat them.
            if all(rendered.count(marker) == 1 for marker in markers):
                return rendered
            problem = "it omits or repeats a turn"
        raise ValueError(
            f"{_at(where)}the chat template of {self._tokenizer.name_or_path} cannot render {roles}: "
            f"{problem}. Try --template plain"
        )

    def _find_end_token(self, control_pattern: str) -> str:
        """Return the control token that follows an answer in the template, or else the EOS token."""
        rendered = self._apply_template((Shape("user"), Shape("assistant")), "")
        after_answer = rendered.partition("⟦assistant 1⟧")[2]
        if control_pattern:
            match = re.match(rf"\s*({control_pattern})", after_answer)
            if match:
                return match[1]
        if self._tokenizer.eos_token is None:
            raise ValueError(
                "neither the template nor the tokenizer has a token that ends an answer; set eos_token "
                "in tokenizer_config.json"
            )
        return self._tokenizer.eos_token

    def _control_id(self, matched: str) -> int:
        """Return the id of a control token that `_part_pattern` has matched in a rendered template."""
        # Strip white space, which the pattern of a token with `lstrip` or `rstrip` also matches.
        if matched in self._control_ids:
            return self._control_ids[matched]
        return self._control_ids[matched.strip()]

    # ---- token ids ----

    def _render_prefix(
        self, turns: Sequence[Message], where: str, is_trained: bool = True
    ) -> TokenizedPrompt:
        """Render all parts before the last answer.

        Args:
            turns: The turns.
            where: Name of the record, for error messages.
            is_trained: Whether this is training data, where an empty answer is an error. In a chat, the model
                may have generated an empty answer, and the conversation continues.
        """
        ids: list[int] = []
        labels: list[int] = []
        text = ""

        def flush() -> None:
            """Encode the text that has accumulated since the last control token, image or answer."""
            nonlocal text
            if not text:
                return
            if ids:
                # Skip the first id, which is the anchor.
                text_ids = self._encode(self._anchored_encoder, self._anchor + text, where)[1:]
            else:
                text_ids = self._encode(self._anchored_encoder, text, where)
            ids.extend(text_ids)
            labels.extend([IGNORE_INDEX] * len(text_ids))
            text = ""

        for part in self._fill(self._layout(turns, where), turns, where):
            if isinstance(part, str):
                # Do not encode it yet, because a token may span the boundary of template and question.
                text += part
                continue
            flush()
            if isinstance(part, Slot):
                content = turns[part.turn].content
                answer = [self.end_id]
                if is_trained or content.strip():
                    answer = self._answer_ids(part, content, where)
                ids.extend(answer)
                labels.extend(answer)
            else:
                ids.append(part)
                labels.append(IGNORE_INDEX)
        flush()
        return TokenizedPrompt(ids, labels)

    def _fill(
        self, layout: Layout, turns: Sequence[Message], where: str
    ) -> Iterator[int | str | Slot]:
        """Replace the slots of questions by their texts, and images by IMAGE_INDEX.

        Slots of earlier answers are yielded as they are.
        """
        counts = [count_images([turn]) for turn in turns]
        for turn, count in enumerate(counts):
            slots = layout.image_slots[turn]
            # A template that accepts strings and has no image slot in this turn leaves `<image>` in the text.
            template_places_images = slots > 0 or not self.accepts_strings
            if self.image_token and count and template_places_images and count != slots:
                raise ValueError(
                    f"{_at(where)}turn {turn + 1} has {count} image(s), but the chat template writes "
                    f"{self.image_token} {slots} time(s) in it; the numbers must be equal"
                )
        for part in layout.prefix:
            if isinstance(part, ImageSlot):
                # In a question without images, the template's image token is an ordinary token.
                yield IMAGE_INDEX if counts[part.turn] else self._image_id()
            elif not isinstance(part, Slot) or turns[part.turn].role == "assistant":
                yield part
            elif counts[part.turn] == 0:
                yield turns[part.turn].content
            elif part.turn in layout.image_slots:
                # The images of this question have image slots.
                yield self._text_without_images(turns[part.turn].content, part.text)
            else:
                # The images of this question are where `<image>` is in its text.
                before, *after_images = turns[part.turn].content.split(IMAGE_PLACEHOLDER)
                yield before
                for text in after_images:
                    yield IMAGE_INDEX
                    yield text

    def _text_without_images(self, content: str, text_index: int) -> str:
        """Return one text of a question for whose images the template writes image tokens.

        Args:
            content: The question, with `<image>`.
            text_index: Index of the text (`Slot.text`). It is not used if the template accepts strings, because
                all texts are then one string.
        """
        texts = [text for text in _texts_between_images(content) if text]
        if self.accepts_strings:
            return "\n".join(texts)
        return texts[text_index] if texts else ""

    def _answer_ids(self, slot: Slot, text: str, where: str) -> list[int]:
        """Return the ids of an answer with its end token; raise ValueError if the answer is empty."""
        ids = self._encode(self._no_prefix_space_encoder, slot.lead + text, where)
        if not text.strip() or not ids:
            raise ValueError(f"{_at(where)}the answer is empty; add its text, or remove the record")
        return [*ids, self.end_id]

    def _encode(self, encoder: tokenizers.Tokenizer, text: str, where: str) -> list[int]:
        try:
            return encoder.encode(text).ids
        except TypeError as error:
            # The library raises TypeError for an unpaired surrogate.
            raise ValueError(f"{_at(where)}not valid Unicode text: {text!r}") from error


# Decoders write this character for bytes that are not valid UTF-8.
_REPLACEMENT_CHARACTER = "\ufffd"
# A regular expression that matches nowhere, for tokenizers without control tokens.
_NEVER_MATCHES = "(?!)"


def _control_pattern(added_tokens: Any) -> str:
    """Return a regular expression that matches every control token; "" if there are none."""
    patterns: list[str] = []
    # Try the longest tokens first, since one token may be a prefix of another.
    for token in sorted(added_tokens, key=lambda token: len(token.content), reverse=True):
        left = r"\s*" if token.lstrip else ""
        right = r"\s*" if token.rstrip else ""
        patterns.append(left + re.escape(token.content) + right)
    return "|".join(patterns)


def _find_byte_tokens(backend: tokenizers.Tokenizer) -> list[int]:
    """Return the ids of the tokens for the bytes 0 to 255; [] if the tokenizer has no byte tokens."""
    from tokenizers import Tokenizer, models

    if backend.decoder is None:
        return []
    # The steps of a decoder can only be read from JSON. Put the decoder into an empty tokenizer, because the JSON
    # of `backend` also contains the vocabulary, which is large.
    empty_tokenizer = Tokenizer(models.BPE())
    empty_tokenizer.decoder = backend.decoder
    if '"ByteFallback"' not in empty_tokenizer.to_str():
        return []
    vocabulary = backend.get_vocab()
    names = [f"<0x{value:02X}>" for value in range(256)]
    if not all(name in vocabulary for name in names):
        return []
    return [vocabulary[name] for name in names]


def _find_token_texts(
    backend: tokenizers.Tokenizer,
    before: Sequence[int],
    byte_values: Mapping[int, int],
    special_ids: set[int],
) -> list[bytes]:
    """Return the text of each token in UTF-8, by id; see `Prompt.token_texts`.

    Args:
        backend: The tokenizer of the tokenizers library.
        before: Ids of a text that is put before each token, because decoders treat the first token differently.
        byte_values: Byte by the id of its token, for tokenizers with byte fallback.
        special_ids: Ids of special tokens. Their text is empty.
    """
    size = backend.get_vocab_size(with_added_tokens=True)
    decoded = backend.decode_batch([[*before, index] for index in range(size)])
    start = len(backend.decode(list(before)))
    byte_of_character = _byte_level_alphabet()
    texts: list[bytes] = []
    for index, text in enumerate(decoded):
        addition = text[start:]
        if index in special_ids:
            texts.append(b"")
        elif index in byte_values:
            texts.append(bytes([byte_values[index]]))
        elif _REPLACEMENT_CHARACTER in addition:
            # The token is a part of a character, so read its bytes from its name in the vocabulary, where
            # byte-level tokenizers write each byte as one visible character.
            token = backend.id_to_token(index) or ""
            values = [byte_of_character.get(character) for character in token]
            known = [value for value in values if value is not None]
            is_byte_level = len(known) == len(values)
            texts.append(bytes(known) if is_byte_level else addition.encode())
        else:
            texts.append(addition.encode())
    return texts


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte for each character that a byte-level tokenizer (such as GPT-2's) uses in its vocabulary.

    Visible characters of Latin-1 stand for themselves. The characters from U+0100 on stand for the other
    bytes, in their order.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(value): value for value in visible}
    others = [value for value in range(256) if chr(value) not in alphabet]
    alphabet.update({chr(256 + number): value for number, value in enumerate(others)})
    return alphabet


def _make_encoder(
    backend: tokenizers.Tokenizer, *, add_prefix_space: bool = True
) -> tokenizers.Tokenizer:
    """Return an encoder with the same vocabulary that does not parse control tokens.

    The option `split_special_tokens` of Transformers is not an alternative: Transformers 5 leaves it turned on in
    the shared tokenizer, and tokens that were added as "not special" (Qwen 3's <think>) are parsed anyway.

    Args:
        backend: The tokenizer of the tokenizers library.
        add_prefix_space: Add a space before the first word if the tokenizer does; False: never add one.
    """
    from tokenizers import Tokenizer, models

    encoder = Tokenizer(models.BPE())
    encoder.normalizer = backend.normalizer
    encoder.pre_tokenizer = backend.pre_tokenizer
    if not add_prefix_space:
        steps = json.loads(encoder.to_str(), object_hook=_without_prefix_space)
        encoder = Tokenizer.from_str(json.dumps(steps))
    encoder.model = backend.model  # Shared, not copied.
    return encoder


def _without_prefix_space(step: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step of a tokenizer.json that adds no space before the first word.

    There are three ways in which a step may add one.
    """
    step = dict(step)
    if "prepend_scheme" in step:
        step["prepend_scheme"] = "never"
    if "add_prefix_space" in step:
        step["add_prefix_space"] = False
    if step.get("type") == "Prepend":
        step["prepend"] = ""
    return step


def _texts_between_images(content: str) -> list[str]:
    """Split a question at each `<image>`, and remove one line break on either side of it."""
    return re.split(rf"\n?{re.escape(IMAGE_PLACEHOLDER)}\n?", content)


def _mark_texts(shape: Shape, turn: int) -> list[dict[str, str]]:
    """Return the content of a message as a list of parts, with a marker in place of each text."""
    content: list[dict[str, str]] = []
    num_texts = 0
    for part in shape.parts:
        if part == "image":
            content.append({"type": "image"})
            continue
        # The markers of a turn with three texts are ⟦user 0⟧, ⟦user 0.1⟧ and ⟦user 0.2⟧.
        suffix = f".{num_texts}" if num_texts else ""
        content.append({"type": "text", "text": f"⟦{shape.role} {turn}{suffix}⟧"})
        num_texts += 1
    return content


def _fold_system_text(contents: Sequence[list[dict[str, str]]]) -> list[list[dict[str, str]]]:
    """Put the text of a system turn before the first text of the question after it."""
    (system,), question, *others = contents
    folded: list[dict[str, str]] = []
    prefix = f"{system['text']}\n\n"
    for part in question:
        if part["type"] == "text":
            part = {"type": "text", "text": prefix + part["text"]}
            prefix = ""
        folded.append(part)
    if prefix:
        # The question has no text, only images.
        folded.append(system)
    return [folded, *others]


def _at(where: str) -> str:
    """Return the beginning of an error message: the name of the record, if there is one."""
    return f"{where}: " if where else ""
