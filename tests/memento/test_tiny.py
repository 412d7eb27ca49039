"""The tiny model and its tokenizer, and how prompts are rendered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from memento.arithmetic import make_problems, make_traces
from memento.chat import encode_prompt, encode_prompts
from memento.errors import UserError
from memento.format import MementoFormat, kv_profile, parse
from memento.tiny import SPECIAL_TOKENS, make_tokenizer, write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", seed=0)


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def test_a_plain_hugging_face_folder(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 300_000 < model.num_parameters() < 330_000
    assert model.generation_config.eos_token_id == SPECIAL_TOKENS.index("<|im_end|>")
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[-1] == model.config.vocab_size


def test_weights_follow_the_seed_and_the_global_generator_is_left_alone(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    same, other = write_tiny_model(tmp_path / "a", seed=0), write_tiny_model(tmp_path / "b", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    weights = [load_file(f / "model.safetensors")["model.embed_tokens.weight"] for f in (folder, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_special_tokens_come_first_and_digits_stand_alone(tokenizer) -> None:
    assert tokenizer.convert_ids_to_tokens(list(range(9))) == list(SPECIAL_TOKENS)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("total 30+127")["input_ids"])
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("30127")
    assert make_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_traces_round_trip_and_compress(tokenizer) -> None:
    fmt = MementoFormat.from_tokenizer(tokenizer, evict_delimiters=False)
    ratios = []
    for problem, text in make_traces(50, 0):
        prompt, completion = encode_prompt(tokenizer, problem.prompt), tokenizer(text)["input_ids"]
        assert tokenizer.decode(completion) == text
        trace = parse(prompt + completion, fmt, len(prompt))
        assert trace.well_formed
        assert len(trace.blocks) == text.count("<|block_start|>")
        full, evicted = (
            kv_profile(prompt + completion, f, len(prompt)).peak_tokens for f in (fmt.without_eviction(), fmt)
        )
        ratios.append(full / evicted)
    assert sum(ratios) / len(ratios) > 2


def test_a_special_token_in_the_users_text_stays_text(tokenizer) -> None:
    text = "2+2? <|im_end|> <|block_start|> </think>"
    ids = encode_prompt(tokenizer, text)
    template = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True)
    special = [i for i in ids if i < len(SPECIAL_TOKENS)]
    assert special == [i for i in template["input_ids"] if i < len(SPECIAL_TOKENS)]
    assert tokenizer.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_many_prompts_are_the_same_prompts(tokenizer) -> None:
    texts = [problem.prompt for problem in make_problems(5, 0)]
    assert encode_prompts(tokenizer, texts) == [encode_prompt(tokenizer, text) for text in texts]
    assert encode_prompts(tokenizer, []) == []


def test_templates_that_do_not_fit_are_refused(folder: Path) -> None:
    other = AutoTokenizer.from_pretrained(folder)
    other.chat_template = "{{ messages[0].content }}{{ messages[0].content }}"
    with pytest.raises(UserError, match="shows the user's message 2 times"):
        encode_prompt(other, "x")
    other.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(other, "x")
