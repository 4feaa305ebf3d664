"""The chat template of a release: an item as a message -> the text that the model was trained on, prompts
included.

It says in Jinja what agff/batch.py's TextRule and agff/processor.py say in Python, so that transformers,
sentence-transformers and servers build the same tokens.
"""

from __future__ import annotations

import json
from typing import Any

from agff.batch import IMAGE_PLACEHOLDER, TextRule
from agff.family import Family
from agff.vocabulary_prompts import VocabularyPrompts

ALL_VECTORS = "all vectors"
"""The system message, sentence-transformers' `prompt`, that asks for the fine-grained prompts too."""
DOCUMENTS_ONLY = "encode_query"
"""The one that a MultiVectorEncoder's queries would get; it is refused."""

_TEMPLATE = """\
{#- One item as a user message: a text, an image, or both. Behind it comes the global prompt, or, where the
    system message is ALL_VECTORS, every prompt. -#}
{%- set item = namespace(text='', images=0, prompts=GLOBAL_PROMPT) -%}
{%- for message in messages -%}
{%- set parts = message['content'] -%}
{%- if parts is string -%}
{%- set parts = [{'type': 'text', 'text': parts}] -%}
{%- endif -%}
{%- if message['role'] not in ['system', 'user'] or (message['role'] == 'user' and not loop.last) -%}
{{- raise_exception('an item is one user message; found ' ~ messages | map(attribute='role') | join(', ')) -}}
{%- endif -%}
{%- for part in parts -%}
{%- if message['role'] == 'system' -%}
{%- if part['text'] == DOCUMENTS_ONLY -%}
{{- raise_exception('queries are encoded as documents are: call encode_document or encode for both') -}}
{%- elif part['text'] == ALL_VECTORS -%}
{%- set item.prompts = ALL_PROMPTS -%}
{%- elif part['text'] -%}
{{- raise_exception('an item has no system message or prompt; an instruction belongs in its text') -}}
{%- endif -%}
{%- elif part['type'] == 'text' -%}
{%- set item.text = item.text ~ part['text'] -%}
{%- elif part['type'] in ['image', 'image_url'] -%}
{%- set item.images = item.images + 1 -%}
{%- else -%}
{{- raise_exception('an item has text and image; found ' ~ part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- if item.images > 1 -%}
{{- raise_exception('an item has one image; found ' ~ item.images) -}}
{%- endif -%}
{%- for token in CONTROL_TOKENS if token in item.text -%}
{{- raise_exception('the text spells the control token ' ~ token ~ ', which would not be read as text') -}}
{%- endfor -%}
{%- if item.text.count(PLACEHOLDER) > item.images -%}
{{- raise_exception('the text holds ' ~ PLACEHOLDER ~ ', which is there once, for the image') -}}
{%- endif -%}
{%- if not item.images -%}
{{- item.text -}}
{%- elif PLACEHOLDER in item.text -%}
{{- item.text.replace(PLACEHOLDER, IMAGE) -}}
{%- elif item.text.strip() -%}
{{- BEFORE_TEXT ~ item.text.strip() ~ BEHIND_TEXT -}}
{%- else -%}
{{- IMAGE_ALONE -}}
{%- endif -%}
{{- item.prompts -}}
"""


def chat_template(vocabulary: VocabularyPrompts, family: Family, texts: TextRule) -> str:
    """A Jinja template for transformers' `apply_chat_template`. It refuses what the model was not trained on
    (several messages or images, video, another system message) and a text that spells a control token, which
    is text to `agff.load` and nowhere else."""
    before, behind = ("".join(tokens) for tokens in family.around_image)
    image = f"{before}{family.image_token}{behind}"
    before_text, behind_text = texts.image_with_text.replace(IMAGE_PLACEHOLDER, image).split("{text}")
    values: dict[str, Any] = {
        "IMAGE": image,
        "CONTROL_TOKENS": vocabulary.control_tokens,
        "IMAGE_ALONE": texts.image_alone.replace(IMAGE_PLACEHOLDER, image),
        "BEFORE_TEXT": before_text,
        "BEHIND_TEXT": behind_text,
        "PLACEHOLDER": IMAGE_PLACEHOLDER,
        "GLOBAL_PROMPT": vocabulary.global_text,
        "ALL_PROMPTS": vocabulary.whole_text,
        "ALL_VECTORS": ALL_VECTORS,
        "DOCUMENTS_ONLY": DOCUMENTS_ONLY,
    }
    # Jinja reads JSON's strings and their escapes; other characters it takes as they are
    settings = (
        f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} -%}}\n" for name, text in values.items()
    )
    return "".join(settings) + _TEMPLATE
