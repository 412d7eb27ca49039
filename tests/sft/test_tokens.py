"""Adding the four delimiters to a model that lacks them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from memento.errors import UserError
from memento.format import DELIMITERS, MementoFormat
from memento.sft.tokens import NOISE_STD, RELATED_WORDS, add_delimiters


def words_tokenizer() -> Any:
    words = sorted({word for related in RELATED_WORDS.values() for word in related})
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i + 1 for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", additional_special_tokens=["<keep>"])


def model(vocab: int, tied: bool) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare_rows", [0, 100])
def test_new_rows_are_the_mean_of_related_words(tied: bool, spare_rows: int) -> None:
    tokenizer = words_tokenizer()
    network = model(len(tokenizer) + spare_rows, tied)
    before = [network.get_input_embeddings().weight.clone(), network.lm_head.weight.clone()]
    rows = before[0].shape[0]
    assert add_delimiters(network, tokenizer, seed=0) == list(DELIMITERS)
    fmt = MementoFormat.from_tokenizer(tokenizer, evict_delimiters=False)
    assert tokenizer("<keep><|block_end|> block")["input_ids"][1] == fmt.block_end
    grown = network.get_input_embeddings().weight.shape[0]
    assert grown == rows if rows >= len(tokenizer) else grown % 64 == 0 and grown - len(tokenizer) < 64
    assert network.config.vocab_size == grown
    assert (network.lm_head.weight is network.get_input_embeddings().weight) == tied
    for old, new in zip(before, (network.get_input_embeddings().weight, network.lm_head.weight), strict=True):
        for token, words in RELATED_WORDS.items():
            row = tokenizer.convert_tokens_to_ids(token)
            mean = old[tokenizer.convert_tokens_to_ids(list(words))].mean(0)
            assert 0 < (new[row] - mean).abs().max() < 5 * NOISE_STD
        known = len(tokenizer) - 4
        assert torch.equal(new[:known], old[:known]), "no other token changes"


def test_nothing_happens_where_they_are_there() -> None:
    tokenizer = words_tokenizer()
    network = model(len(tokenizer), tied=True)
    add_delimiters(network, tokenizer, seed=0)
    weight = network.get_input_embeddings().weight.clone()
    assert add_delimiters(network, tokenizer, seed=1) == []
    assert torch.equal(weight, network.get_input_embeddings().weight)


def test_delimiters_that_mean_something_else_are_refused() -> None:
    tokenizer = words_tokenizer()
    tokenizer.add_tokens(["<|block_end|>"], special_tokens=False)
    with pytest.raises(UserError, match=r"<\|block_end\|> \(id \d+\) as an ordinary piece of text"):
        add_delimiters(model(len(tokenizer) + 10, tied=True), tokenizer, seed=0)
    tokenizer = words_tokenizer()
    tokenizer.add_tokens([AddedToken("<|summary_start|>", special=True, lstrip=True)])
    with pytest.raises(UserError, match="swallows the white space around it"):
        add_delimiters(model(len(tokenizer) + 10, tied=True), tokenizer, seed=0)
    tokenizer = words_tokenizer()
    small = model(len(tokenizer), tied=True)
    tokenizer.add_tokens(list(DELIMITERS), special_tokens=True)
    with pytest.raises(UserError, match="tokenizer and model do not belong together"):
        add_delimiters(small, tokenizer, seed=0)
