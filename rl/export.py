"""A run's model as a plain Hugging Face folder that stock `transformers` and `vllm serve` load.

    memento export runs/rl --out models/my-memento

The folder holds safetensors, config, tokenizer with the four delimiters, chat template, a generation config with every
end-of-sequence id, and a model card with the run's configuration and results. It is written aside, loaded by
`transformers` (without memory for the weights) and only then given its name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import memento
from memento.config import FormatConfig, RlConfig, to_yaml
from memento.errors import UserError, disk_is_full
from memento.format import DELIMITERS
from memento.preflight import load_tokenizer
from memento.problems import Record
from memento.results import QuickstartResults, percent, read_results
from memento.rl.checkpoint import CHECKPOINTS, latest_checkpoint, load_state
from memento.run import load_run_config, read_metrics

CARD = "README.md"

DTYPES = ("float32", "bfloat16", "float16")

SHARD_GB = 5.0
"""Largest safetensors file of an export, in 10^9 bytes."""


class ExportError(UserError):
    """What was written, or was to be exported, is not a whole model. The message names the file or tensor."""


class ModelCheck(Record):
    """What `check_model_folder` found.

    Attributes:
        architecture: as in config.json.
        parameters: tied ones counted once.
        tied: parameter -> the one it shares its storage with.
        eos_token_ids: every id that ends a generation.
    """

    architecture: str
    parameters: int
    tied: dict[str, str]
    eos_token_ids: tuple[int, ...]


def export_run(
    run_folder: str | Path,
    out: str | Path,
    step: int | None = None,
    *,
    dtype: str | None = None,
    shard_gb: float = SHARD_GB,
) -> Path:
    """Write the model of a run to `out`.

    Args:
        run_folder: of an RL run.
        out: the folder to make. It may be there if it is empty.
        step: the checkpoint to take. None: the finished model in ``hf``, or the newest checkpoint where there is none.
        dtype: of the weights, a key of `DTYPES`. None: the learner's.
        shard_gb: largest safetensors file, in 10^9 bytes.

    Returns:
        `out`.

    Raises:
        UserError: no such run, checkpoint or dtype, `out` is not empty, or the disk is full. Nothing is overwritten,
            and nothing half-written has the name `out`.
        ExportError: the model does not load.
    """
    run_folder, out = Path(run_folder), Path(out)
    config = load_run_config(run_folder)
    if not isinstance(config, RlConfig):
        raise UserError(f"{run_folder} is an SFT run; its model is {run_folder / 'hf'} as it is.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out names the folder to write.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty, and an export overwrites nothing. Choose another --out.")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype!r} is none of {', '.join(DTYPES)}.")
    finished = run_folder / "hf"
    checkpoint = None if step is None and (finished / "config.json").is_file() else _checkpoint(run_folder, step)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        if checkpoint is not None:
            _weights_of_checkpoint(checkpoint, config, aside, dtype, shard_gb)
        elif dtype is None and max(f.stat().st_size for f in finished.iterdir()) <= shard_gb * 1e9:
            for file in sorted(f for f in finished.iterdir() if f.is_file() and f.name != CARD):
                shutil.copy2(file, aside / file.name)
        else:
            _weights_of_folder(finished, aside, dtype, shard_gb)
        finish_folder(
            aside, run_folder, step=load_state(checkpoint).step if checkpoint else config.steps, name=out.name
        )
        aside.chmod(0o755)
        os.replace(aside, out)  # replaces an empty folder, fails on any other
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if disk_is_full(error):
            raise UserError(f"the disk of {out.parent} is full: make room, or choose another --out.") from error
        raise
    return out


def finish_folder(folder: str | Path, run_folder: str | Path, *, step: int, name: str | None = None) -> ModelCheck:
    """Complete a folder that holds weights, config and tokenizer: generation config and model card; then check it.

    The trainer calls it on what `Learner.save_hf` wrote.

    Raises:
        ExportError: as `check_model_folder`.
    """
    folder, run_folder = Path(folder), Path(run_folder)
    config = load_run_config(run_folder)
    write_generation_config(folder)
    checked = check_model_folder(folder, config.format)
    card = model_card(run_folder, checked, step=step, name=name or run_folder.resolve().name)
    (folder / CARD).write_text(card, encoding="utf-8")
    return checked


def _checkpoint(run_folder: Path, step: int | None) -> Path:
    if step is None:
        found = latest_checkpoint(run_folder)
        if found is None:
            raise UserError(
                f"{run_folder} holds neither a finished model (hf) nor a checkpoint: the run took no step yet."
            )
        return found
    found = run_folder / CHECKPOINTS / f"step-{step:06d}"
    if not found.is_dir():
        there = sorted(int(f.name.removeprefix("step-")) for f in (run_folder / CHECKPOINTS).glob("step-*"))
        have = f"There are steps {', '.join(map(str, there))}." if there else "There is none."
        raise UserError(f"{run_folder} has no checkpoint of step {step}. {have}")
    load_state(found)  # refuses a torn one
    return found


def _weights_of_folder(source: Path, folder: Path, dtype: str | None, shard_gb: float) -> None:
    """A model folder again, in another dtype or in other shards; what is no weight is copied."""
    import torch
    from transformers import AutoModelForCausalLM

    wanted = "auto" if dtype is None else getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=wanted, local_files_only=True)
    model.save_pretrained(folder, max_shard_size=int(shard_gb * 1e9))
    for file in sorted(f for f in source.iterdir() if f.is_file()):
        is_weight = file.suffix in (".safetensors", ".bin", ".pt") or file.name.endswith(".index.json")
        if not is_weight and file.name != CARD and not (folder / file.name).exists():
            shutil.copy2(file, folder / file.name)


def _weights_of_checkpoint(
    checkpoint: Path, config: RlConfig, folder: Path, dtype_name: str | None, shard_gb: float
) -> None:
    """Weights out of DeepSpeed's own files (ZeRO 0 to 3), in the run's dtype or another; the rest is the base's."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from memento.rl.learner import CHECKPOINT_FOLDER
    from memento.rl.learner_rank import CHECKPOINT_TAG
    from memento.rl.lora import merge_state

    dtype = getattr(torch, dtype_name or config.learner.dtype)
    saved = checkpoint / CHECKPOINT_FOLDER
    if config.learner.zero_stage < 3:  # every rank holds the whole model
        file = saved / CHECKPOINT_TAG / "mp_rank_00_model_states.pt"
        state = torch.load(file, map_location="cpu", weights_only=False)["module"]
    else:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = get_fp32_state_dict_from_zero_checkpoint(str(saved), tag=CHECKPOINT_TAG)
    assert state is not None  # only a lazy state dict is not returned at once
    # The learner trains the model inside a wrapper that owns it as `model`.
    weights = {name.removeprefix("model."): tensor.to(dtype) for name, tensor in state.items()}
    if config.learner.lora is not None:
        weights = merge_state(weights, config.learner.lora)
    model_config = AutoConfig.from_pretrained(config.model)
    model: Any = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    loaded = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    missing = set(loaded.missing_keys) - set(model.all_tied_weights_keys)
    if missing or loaded.unexpected_keys:
        names = ", ".join(sorted([*missing, *loaded.unexpected_keys])[:5])
        raise ExportError(f"{checkpoint} does not fit the model {config.model}: {names}.")
    try:
        model.generation_config = GenerationConfig.from_pretrained(config.model)
    except OSError:
        model.generation_config = GenerationConfig.from_model_config(model_config)
    model.save_pretrained(folder, max_shard_size=int(shard_gb * 1e9))
    load_tokenizer(config.model).save_pretrained(folder)


# ---------------------------------------------------------------------------------------------- the folder


def write_generation_config(folder: Path) -> tuple[int, ...]:
    """Write ``generation_config.json`` so that every id that may end an answer does.

    Collected from the tokenizer, the model's config and the generation config that is there; the tokenizer's is first.

    Raises:
        ExportError: none of them names one.
    """
    from transformers import AutoConfig, GenerationConfig

    tokenizer, config = load_tokenizer(folder), AutoConfig.from_pretrained(folder)
    there = (folder / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(folder) if there else GenerationConfig.from_model_config(config)
    ids: list[int] = []
    for found in (tokenizer.eos_token_id, generation.eos_token_id, getattr(config, "eos_token_id", None)):
        ids += [i for i in (found if isinstance(found, list | tuple) else [found]) if i is not None]
    ids = list(dict.fromkeys(ids))
    if not ids:
        raise ExportError(f"{folder}: neither tokenizer nor config names an end-of-sequence token.")
    generation.eos_token_id = ids if len(ids) > 1 else ids[0]
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ids[0]
    generation.save_pretrained(folder)
    return tuple(ids)


def check_model_folder(folder: str | Path, format: FormatConfig | None = None) -> ModelCheck:
    """Load a folder with `transformers` on the meta device: every tensor by name and shape, but no memory for them.

    Raises:
        ExportError: a tensor is missing, unknown or of another shape; the tokenizer lacks a delimiter or the chat
            template, or has ids beyond the embedding.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    folder = Path(folder)
    quiet, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # its own report of what is missing; ours is the error below
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
        )
        model, info = loaded
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ExportError(f"{folder} does not load: {str(error).strip().splitlines()[0]}") from error
    finally:
        logging.set_verbosity(quiet)
        if bars:
            logging.enable_progress_bar()
    tied = dict(model.all_tied_weights_keys)
    wrong = {
        "missing": sorted(set(info["missing_keys"]) - set(tied)),
        "unknown": sorted(info["unexpected_keys"]),
        "of another shape": sorted(key[0] for key in info["mismatched_keys"]),
    }
    faults = [
        f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''} {what}" for what, names in wrong.items() if names
    ]
    if faults:
        raise ExportError(f"{folder} is not a whole {type(model).__name__}: {'; '.join(faults)}.")
    tokenizer = load_tokenizer(folder)
    (format or FormatConfig()).bind(tokenizer)
    if not tokenizer.chat_template:
        raise ExportError(f"{folder}: the tokenizer has no chat template.")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ExportError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the embedding only {rows} rows.")
    eos = GenerationConfig.from_pretrained(folder).eos_token_id
    return ModelCheck(
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        tied=tied,
        eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (eos,) if eos is not None else (),
    )


# ---------------------------------------------------------------------------------------------- the card


def model_card(run_folder: Path, checked: ModelCheck, *, step: int, name: str) -> str:
    """The model card: what this is, results, how to serve it, and the configuration that made it."""
    config = load_run_config(run_folder)
    assert isinstance(config, RlConfig)
    flags = serve_flags(config.format)
    results = run_folder.parent / "results.json"
    tables = [_run_results(run_folder, step)]
    if results.is_file() and step == config.steps:
        tables.append(_quickstart_results(read_results(results)))
    shown = "\n\n".join(t for t in tables if t) or "The run has not evaluated itself."
    delimiters = ", ".join(f"`{token}`" for token in DELIMITERS)
    algorithm, learner = config.algorithm, config.learner
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- memento
- reinforcement-learning
- kv-cache-eviction
---

# {name}

A reasoning model ({checked.architecture}, {_count(checked.parameters)} parameters) that compresses its own context. It
writes its reasoning in blocks and closes each one with a *memento*, a short record of what matters; then the block
leaves the KV cache, and only the memento stays. The method is that of MEMENTO (arXiv 2604.09852). The four delimiters
are {delimiters}.

Trained by memento-rl {memento.__version__} from `{config.model}`: {step} RL steps of {config.groups_per_step} problems
x {config.group_size} samples ({algorithm.loss.upper()}, learning rate {learner.lr:g}), rollouts under eviction.

## Results

{shown}

## Use

With eviction, behind the OpenAI API (vLLM, with memento-rl installed):

```
memento serve {name}{flags} --port 8000
```

Without eviction it is an ordinary model:

```
vllm serve {name}
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
```

The text then still holds blocks and mementos, but the model sees everything it wrote, which is not how it was trained:
expect other accuracies, and the KV cache of an ordinary model. With eviction in plain transformers:

```python
from memento.format import MementoFormat
from memento.generation import generate  # of memento-rl; needs torch and transformers only

fmt = MementoFormat.from_tokenizer(tokenizer, evict_delimiters={config.format.evict_delimiters})
prompt = tokenizer.apply_chat_template([{{"role": "user", "content": "..."}}], add_generation_prompt=True)
result = generate(model, list(prompt["input_ids"]), fmt, max_new_tokens=4096)
print(tokenizer.decode(result.completion_ids))
```

## Configuration of the run

```yaml
{to_yaml(config).strip()}
```
"""


def serve_flags(format: FormatConfig) -> str:
    """The flags of ``memento serve`` that a model's format needs, with a leading space; empty for the defaults."""
    flags = " --evict-delimiters" if format.evict_delimiters else ""
    flags += f" --keep-last-n {format.keep_last_n}" if format.keep_last_n else ""
    return flags + (f" --max-block-tokens {format.max_block_tokens}" if format.max_block_tokens else "")


def _run_results(run_folder: Path, step: int) -> str:
    labels = {
        "eval/accuracy": "held-out accuracy",
        "eval/accuracy_stderr": "its standard error",
        "reward/mean": "training reward, mean of the step",
        "kv/peak_ratio": "peak KV, without over with eviction",
        "memento/compression": "block tokens over memento tokens",
        "mismatch/kl_mean": "KL between engine and learner (nats)",
    }
    if not (run_folder / "metrics.jsonl").is_file():
        return ""
    rows = []
    for key, label in labels.items():
        logged = [
            (row["step"], row[key])
            for row in read_metrics(run_folder)
            if row.get(key) is not None and (row["step"] or 0) <= step
        ]
        if logged:
            at, value = logged[-1]
            rows.append(f"| {label} | {value:.4g} | {at} |")
    return "\n".join(["| during the run | value | at step |", "|---|---|---|", *rows]) if rows else ""


def _quickstart_results(results: QuickstartResults) -> str:
    from memento.results import ROWS, TEMPERATURES, caption

    head = "| model | " + " | ".join(TEMPERATURES.values()) + " |"
    lines = [f"{caption(results)}:", "", head, "|---" * (len(TEMPERATURES) + 1) + "|"]
    for row, model in ROWS.items():
        lines.append(f"| {model.label} | " + " | ".join(percent(results.cell(row, t)) for t in TEMPERATURES) + " |")
    return "\n".join(lines)


def _count(parameters: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return str(parameters)
