"""How a problem becomes prompt tokens. SFT, rollouts and RL all render it here, and only here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memento.errors import UserError

_SENTINEL = "USER-TEXT-GOES-HERE"


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
