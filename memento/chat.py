"""How a problem becomes prompt tokens. SFT, rollouts and RL all render it here, and only here.

The template is the tokenizer's own. SFT sets it once (`install_template`), so that the saved model carries what it was
trained with: plain ChatML without a system prompt for Qwen and Olmo, whose own templates add one or open the thinking;
Phi-4 keeps its own, which holds its system prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memento.errors import UserError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML as MEMENTO (arXiv 2604.09852, section on data) uses it: the problem is the user's turn, nothing before it."""

_SENTINEL = "USER-TEXT-GOES-HERE"


def install_template(tokenizer: Any, template: str = "auto") -> str:
    """Give a tokenizer the chat template that its model is trained with.

    Args:
        tokenizer: changed in place.
        template: ``chatml``; ``own``, whatever the tokenizer came with; ``auto``, its own where that separates turns
            with ``<|im_sep|>`` (Phi-4), else ChatML where the tokenizer has its tokens, else its own.

    Returns:
        ``chatml`` or ``own``.

    Raises:
        UserError: ChatML was asked for and the tokenizer lacks its tokens, or there is no template at all.
    """
    known = tokenizer.get_vocab()
    lacking = [token for token in ("<|im_start|>", "<|im_end|>") if token not in known]
    chosen = template
    if template == "auto":
        chosen = "own" if lacking or "<|im_sep|>" in known else "chatml"
    if chosen == "chatml":
        if lacking:
            raise UserError(f"chat_template: chatml needs {' and '.join(lacking)} in the tokenizer; use own or auto.")
        tokenizer.chat_template = CHATML
    elif not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the tokenizer has no chat template and no ChatML tokens; start from a chat model, or add "
            "chat_template.jinja to it."
        )
    return chosen


def opens_thinking(tokenizer: Any) -> bool:
    """Whether the prompt ends with ``<think>`` already, so that the completion begins after it."""
    messages = [{"role": "user", "content": _SENTINEL}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return rendered.rstrip().endswith("<think>")


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of the user turn and the opening of the assistant's, by the tokenizer's own chat template.

    `text` is data: a special token spelled in it (``<|block_start|>``, ``<|im_end|>``) becomes ordinary text tokens. So
    the template is rendered around a placeholder, and the pieces are encoded apart.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        text: the user's message.

    Raises:
        UserError: the tokenizer has no chat template, or one that does not show the message exactly once.
    """
    return encode_prompts(tokenizer, [text])[0]


def encode_prompts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`encode_prompt` for many messages at once. Arguments and errors as there."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the tokenizer has no chat template; start from a chat model, or add chat_template.jinja to it."
        )
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": _SENTINEL}], tokenize=False, add_generation_prompt=True
    )
    if rendered.count(_SENTINEL) != 1:
        raise UserError(f"the chat template shows the user's message {rendered.count(_SENTINEL)} times, expected once.")
    if not texts:
        return []
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in rendered.split(_SENTINEL))
    middles = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [[*before, *middle, *after] for middle in middles]


def end_of_turn(tokenizer: Any) -> int:
    """The id of the token with which the chat template ends the assistant's turn; ``eos_token_id`` if it adds none."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
    after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(_SENTINEL)[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return int(ids[0]) if ids else int(tokenizer.eos_token_id)
