"""A Qwen3 of 0.3 M parameters and its tokenizer, made from a seed: the quickstart's and the tests' model.

Twins in the architectures of Qwen2.5, Phi-4 and Olmo 3 (`FAMILIES`) stand in for those models in tests. Each is saved
as an ordinary Hugging Face folder, so that every part of the system takes it for any other model. torch and
transformers are imported when it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from memento.arithmetic import make_traces
from memento.chat import CHATML
from memento.format import DELIMITERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", *DELIMITERS)

FAMILIES = ("qwen3", "qwen2", "phi3", "olmo3")
"""Architectures by the names of `transformers`: Qwen3, Qwen2.5, Phi-4, Olmo 3."""

SEPARATOR = "<|im_sep|>"
PHI_TEMPLATE = (
    "<|im_start|>system<|im_sep|>Think in blocks.<|im_end|>"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}<|im_sep|>{{ message['content'] }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
"""As Phi-4's: a system prompt of its own, and a token between role and content."""

MERGES = 150
"""At most so many merges are learned; the corpus has fewer to learn (every word of it is one token then)."""


def make_tokenizer(family: str = "qwen3") -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, trained on traces of the arithmetic family. The same every time.

    Phi's has one token more, at the end, and its own chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL_TOKENS) + 256 + MERGES,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    phi = family == "phi3"
    extra = [t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[*extra, SEPARATOR] if phi else extra,
        chat_template=PHI_TEMPLATE if phi else CHATML,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def write_tiny_model(
    folder: Path | str,
    seed: int,
    *,
    family: str = "qwen3",
    hidden_size: int = 64,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    intermediate_size: int = 256,
) -> Path:
    """Write a randomly initialised model with its tokenizer to `folder`, in fp32.

    Args:
        folder: created if it is not there.
        seed: of the weights; torch's global generator is left as it was.
        family: one of `FAMILIES`. Olmo 3 has three layers with a window of 64 keys to one without.
        hidden_size, layers, heads, kv_heads, head_dim, intermediate_size: the architecture, as Qwen3 names it.

    Returns:
        The folder: config, safetensors, tokenizer, chat template, generation config (it ends at ``<|im_end|>``).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    tokenizer = make_tokenizer(family)
    end, pad = SPECIAL_TOKENS.index("<|im_end|>"), SPECIAL_TOKENS.index("<|endoftext|>")
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        rope_parameters={"full_attention": dict(rope), "sliding_attention": dict(rope)} if family == "olmo3" else rope,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        dtype="float32",
        **_family_settings(family, head_dim),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=True, temperature=1.0)
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _family_settings(family: str, head_dim: int) -> dict[str, object]:
    """What sets the architectures apart. Only Qwen3 names its head size; the others take hidden size / heads."""
    return {
        "qwen3": {"head_dim": head_dim, "tie_word_embeddings": True},
        "qwen2": {"tie_word_embeddings": False},
        "phi3": {"tie_word_embeddings": False, "original_max_position_embeddings": 2048},
        "olmo3": {"tie_word_embeddings": False, "sliding_window": 64},
    }[family]


def _corpus() -> Iterator[str]:
    for problem, trace in make_traces(400, seed=0):
        for special in SPECIAL_TOKENS:
            trace = trace.replace(special, "\n")
        yield f"user\n{problem.prompt}\n"
        yield f"assistant\n{trace}"
