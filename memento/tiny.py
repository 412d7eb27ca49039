"""A Qwen3 of 0.3 M parameters and its tokenizer, made from a seed: the quickstart's and the tests' model.

It is saved as an ordinary Hugging Face folder, so that every part of the system takes it for any other model. torch and
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

MERGES = 150
"""At most so many merges are learned; the corpus has fewer to learn (every word of it is one token then)."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, trained on traces of the arithmetic family. The same every time."""
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHATML,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def write_tiny_model(
    folder: Path | str,
    seed: int,
    *,
    hidden_size: int = 64,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    intermediate_size: int = 256,
) -> Path:
    """Write a randomly initialised Qwen3 with its tokenizer to `folder`, in fp32.

    Args:
        folder: created if it is not there.
        seed: of the weights; torch's global generator is left as it was.
        hidden_size, layers, heads, kv_heads, head_dim, intermediate_size: the architecture, as Qwen3 names it.

    Returns:
        The folder: config, safetensors, tokenizer, chat template, generation config (it ends at ``<|im_end|>``).
    """
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    end, pad = SPECIAL_TOKENS.index("<|im_end|>"), SPECIAL_TOKENS.index("<|endoftext|>")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=True, temperature=1.0)
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _corpus() -> Iterator[str]:
    for problem, trace in make_traces(400, seed=0):
        for special in SPECIAL_TOKENS:
            trace = trace.replace(special, "\n")
        yield f"user\n{problem.prompt}\n"
        yield f"assistant\n{trace}"
