"""Give a model that has never seen them the four delimiters of the memento format."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from memento.errors import UserError
from memento.format import BLOCK_END, BLOCK_START, DELIMITERS, SUMMARY_END, SUMMARY_START

RELATED_WORDS: dict[str, tuple[str, ...]] = {
    BLOCK_START: ("block", "start", "begin", "section", "step"),
    BLOCK_END: ("block", "end", "finish", "section", "done"),
    SUMMARY_START: ("summary", "summarize", "brief", "recap", "overview"),
    SUMMARY_END: ("summary", "end", "finish", "done", "complete"),
}
"""A new token starts as the mean embedding of these words (MEMENTO, arXiv 2604.09852, appendix on training)."""

NOISE_STD = 0.01
ROWS_MULTIPLE = 64
"""An embedding that has to grow gets a multiple of so many rows: matrix kernels like it."""


def add_delimiters(model: PreTrainedModel, tokenizer: Any, seed: int) -> list[str]:
    """Add the delimiters that the tokenizer lacks, and initialise their rows of both embedding matrices.

    A row becomes the mean of the rows of `RELATED_WORDS` (each with a leading space; a word of several tokens counts as
    their mean) plus N(0, `NOISE_STD`). The embedding grows only where the matrix has no spare row for a new id, then to
    a multiple of `ROWS_MULTIPLE`; tied matrices stay tied.

    Args:
        model, tokenizer: changed in place.
        seed: of the noise.

    Returns:
        The tokens that were added; an empty list where all were there, and then nothing was touched.

    Raises:
        UserError: the tokenizer uses one of them for something else, or the model has no row for one it knows.
    """
    missing = [token for token in DELIMITERS if token not in tokenizer.get_vocab()]
    _check_known(model, tokenizer, [token for token in DELIMITERS if token not in missing])
    if not missing:
        return []
    related = {
        token: [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in RELATED_WORDS[token]]
        for token in missing
    }
    tokenizer.add_tokens(missing, special_tokens=True)
    if len(tokenizer) > len(_matrices(model)[0]):
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=ROWS_MULTIPLE, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight_VD in _matrices(model):
            for token, words in related.items():
                mean_D = torch.stack([weight_VD[ids].float().mean(0) for ids in words]).mean(0)
                noise_D = torch.randn(mean_D.shape, generator=generator).to(mean_D.device) * NOISE_STD
                weight_VD[tokenizer.convert_tokens_to_ids(token)] = (mean_D + noise_D).to(weight_VD.dtype)
    return missing


def _check_known(model: PreTrainedModel, tokenizer: Any, known: list[str]) -> None:
    """Refuse delimiters that are there but mean something else."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    rows = len(_matrices(model)[0])
    for token in known:
        index = tokenizer.convert_tokens_to_ids(token)
        entry = added.get(index)
        if entry is None or not entry.special:
            raise UserError(
                f"the tokenizer has {token} (id {index}) as an ordinary piece of text, not as a special token; memento "
                "delimiters must be special tokens of their own. Take another base model, or rename that token."
            )
        if entry.lstrip or entry.rstrip or entry.single_word:
            raise UserError(
                f"the tokenizer's {token} (id {index}) swallows the white space around it or matches whole words only "
                "(lstrip, rstrip, single_word); memento delimiters must stand for themselves alone."
            )
        if tokenizer(f"x{token}x", add_special_tokens=False)["input_ids"].count(index) != 1:
            raise UserError(f"the tokenizer knows {token} (id {index}) but does not encode its text as that one token.")
        if index >= rows:
            raise UserError(
                f"the tokenizer has {token} (id {index}) but the model's embedding has only {rows} rows: tokenizer and "
                "model do not belong together."
            )


def _matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    """The input embeddings [V, D], and the output head [V, D] where it is another matrix."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is None or head.weight is embedding.weight:
        return [embedding.weight]
    return [embedding.weight, head.weight]
