"""The chat template of an exported model, for Transformers' processors and for servers.

The template of an exported folder differs from that of the tokenizer in five ways:

- Transformers' processors pass a user's message as a list of parts, `[{"type": "image"}, {"type":
  "text", "text": "..."}]`, but the templates of language models expect one string. A Jinja prelude,
  which `stock_chat_template` prepends to the template, joins the parts. Templates of imported models may
  write the image token themselves: then the prelude drops the image parts, or is not needed at all.
- llama.cpp replaces the image part by a marker (`<__media__>`), without the line break after the image
  that the model was trained with. `FLATTEN_CONTENT_WITH_MARKERS` adds it.
- Our own templates (`plain`, `bare`) end where the answer begins, so that training can append it.
  Other tools render with `add_generation_prompt=True`, which must append `GENERATION_PROMPT`.
- Templates that write the current date (Llama 3.2) write the date of training, so that the prompt is the same every day.
- Some templates begin an answer differently in a prompt than in a conversation: that of Qwen 3 writes an empty
  `<think>` block only in a conversation. The model was trained on conversations, so `_with_trained_beginning` makes the
  two equal.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llava_simplified.prompt import FIXED_DATE, TEMPLATES

if TYPE_CHECKING:
    from llava_simplified.model.llava import Llava

# A Jinja template. `{%-` and `-%}` remove the line breaks and the indentation around each tag, which must
# not become part of the prompt. IMAGE and TEXT are replaced below: by what is written for an image, and by
# the expression for the text of a message.
_FLATTEN_CONTENT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set content = namespace(text='') -%}
  {%- if message['content'] is string -%}
    {%- set content.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {%- set content.text = content.text + IMAGE -%}
      {%- else -%}
        {%- set content.text = content.text + part['text'] -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set text = TEXT -%}
  {%- set flat.messages = flat.messages + [{'role': message['role'], 'content': text}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}"""

_FLATTEN_FOR_STOCK = _FLATTEN_CONTENT.replace("TEXT", "content.text")
# A Jinja string. As in training, a line break follows the image.
_IMAGE_LINE = r"'<image>\n'"

# llama.cpp's markers are <__media__> or <__media_ab12__>. Write exactly one line break after a marker: the
# first filter removes the line break that some clients write, the second adds one.
FLATTEN_CONTENT_WITH_MARKERS = _FLATTEN_CONTENT.replace("IMAGE", _IMAGE_LINE).replace(
    "TEXT", r"content.text | replace('__>\n', '__>') | replace('__>', '__>\n')"
)

# Name of our template -> Jinja code that writes the beginning of the answer.
GENERATION_PROMPT = {
    "plain": "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "bare": "",
}


def get_chat_template(model: Llava) -> str:
    """Return the chat template that the model was trained with, including its generation prompt and its date."""
    name = model.prompt.name
    if name in TEMPLATES:
        return TEMPLATES[name] + GENERATION_PROMPT[name]
    template = model.tokenizer.get_chat_template()
    # Leave all other templates as they are: not every program that renders templates supports macros.
    if "strftime_now" in template:
        template = FIXED_DATE + template
    # A template that expects lists of parts cannot be rendered here.
    return _with_trained_beginning(model, template) if model.prompt.accepts_strings else template


def _with_trained_beginning(model: Llava, template: str) -> str:
    """Return a template that begins the answer in a prompt as it does in a conversation."""
    tokenizer: Any = model.tokenizer

    def render(*roles: str, add_generation_prompt: bool = False) -> str:
        messages = [{"role": role, "content": f"⟦{role}⟧"} for role in roles]
        text: str = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return text

    # A space before the answer is a part of the answer, see `Prompt`.
    trained = render("user", "assistant").partition("⟦assistant⟧")[0].rstrip(" ")
    question = render("user")
    if render("user", add_generation_prompt=True) == trained or not trained.startswith(question):
        return template
    beginning = json.dumps(trained.removeprefix(question), ensure_ascii=False)
    return (
        "{%- set begin_answer = add_generation_prompt is defined and add_generation_prompt -%}"
        "{%- set add_generation_prompt = false -%}"
        # Jinja drops one line break at the end of a template, but not in the middle.
        + template.removesuffix("\n")
        + "{% if begin_answer %}{{ "
        + beginning
        + " }}{% endif %}"
    )


def stock_chat_template(model: Llava) -> str:
    """Return the chat template of an exported stock LLaVA folder, for messages that are lists of parts."""
    template = get_chat_template(model)
    # A template that expects lists of parts needs no conversion.
    if not model.prompt.accepts_strings:
        return template
    # A template that writes the image token itself needs no placeholder in the text.
    image = "''" if model.prompt.image_token else _IMAGE_LINE
    return _FLATTEN_FOR_STOCK.replace("IMAGE", image) + template
