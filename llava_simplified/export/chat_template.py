"""The chat template of an exported model, in a form that stock processors and servers can render.

Three things differ between the template that a tokenizer has and the one that an exported folder
needs:

- A stock processor passes a user's message as a list of parts, `[{"type": "image"}, {"type": "text",
  "text": "..."}]`. The templates of language models expect one string. `FLATTEN_CONTENT` joins the
  parts in front of the template.
- llama.cpp replaces the image part by a marker (`<__media__>`), and does not write the line break
  behind it that the model was trained with. `FLATTEN_CONTENT_WITH_MARKERS` adds it.
- Our own templates (`plain`, `bare`) end where the answer begins, so that training can append it.
  Other tools render `add_generation_prompt=True` instead. `GENERATION_PROMPT` is what that must add.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_simplified.prompt import TEMPLATES

if TYPE_CHECKING:
    from llava_simplified.model.llava import Llava

# Jinja. `{%-` and `-%}` remove the line breaks and the indentation around each tag, so that nothing of
# this reaches the prompt. The image is written as "<image>\n", as in training.
_FLATTEN_CONTENT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set content = namespace(text='') -%}
  {%- if message['content'] is string -%}
    {%- set content.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {%- set content.text = content.text + '<image>\\n' -%}
      {%- else -%}
        {%- set content.text = content.text + part['text'] -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set text = TEXT -%}
  {%- set flat.messages = flat.messages + [{'role': message['role'], 'content': text}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}"""

FLATTEN_CONTENT = _FLATTEN_CONTENT.replace("TEXT", "content.text")

# llama.cpp's markers are <__media__> or <__media_ab12__>. The first filter removes a line break that
# some clients do write behind the marker, the second writes exactly one.
FLATTEN_CONTENT_WITH_MARKERS = _FLATTEN_CONTENT.replace(
    "TEXT", r"content.text | replace('__>\n', '__>') | replace('__>', '__>\n')"
)

GENERATION_PROMPT = {
    "plain": "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "bare": "",
}


def get_chat_template(model: Llava) -> str:
    """Return the chat template that the model was trained with, as any tokenizer can render it."""
    name = model.prompt.name
    if name in TEMPLATES:
        return TEMPLATES[name] + GENERATION_PROMPT[name]
    return model.tokenizer.get_chat_template()
