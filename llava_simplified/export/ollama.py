"""The `Modelfile` for Ollama: the files of the model, and its prompt template."""

from __future__ import annotations

from typing import Any

from llava_simplified.export.chat_template import get_chat_template
from llava_simplified.model.llava import Llava

# A character that occurs in no chat template. It marks the place of the user's message.
_MARKER = "⟦"

# A Go template, as Ollama expects. Ollama puts "[img-0]" before the message, without the line break that
# the model was trained with. Therefore, if the prompt starts with an image, write these seven characters,
# a line break, and the rest of the prompt.
_PROMPT = (
    '{{ if and (ge (len .Prompt) 7) (eq (slice .Prompt 0 5) "[img-") }}'
    "{{ slice .Prompt 0 7 }}\n{{ slice .Prompt 7 }}"
    "{{ else }}{{ .Prompt }}{{ end }}"
)


def modelfile(model: Llava) -> str:
    """Return the text of a `Modelfile`, for `ollama create NAME -f Modelfile`."""
    tokenizer: Any = model.tokenizer
    rendered: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARKER}],
        chat_template=get_chat_template(model),
        add_generation_prompt=True,
        tokenize=False,
    )
    before, after = rendered.split(_MARKER)
    if tokenizer.bos_token:
        before = before.removeprefix(tokenizer.bos_token)  # Ollama adds it itself
    end_token = tokenizer.convert_ids_to_tokens(model.prompt.end_id)
    template = f"{before}{_PROMPT}{after}{{{{ .Response }}}}"
    # Ollama loads both files: the language model, and the vision tower with the projector.
    lines = [
        "FROM ./model.gguf",
        "FROM ./mmproj.gguf",
        f'TEMPLATE """{template}"""',
        f'PARAMETER stop "{end_token}"',
        "PARAMETER temperature 0",
    ]
    return "\n".join(lines) + "\n"
