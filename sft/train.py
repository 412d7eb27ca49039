"""One SFT stage, as a process of its own.

    python -m memento.sft.train configs/sft/quickstart_stage1.yaml out=runs/stage1 seed=1
    memento sft configs/sft/quickstart_stage2.yaml model=runs/stage1/hf out=runs/stage2

TRL's SFTTrainer under DeepSpeed does the training. What is ours: the rows carry ``visible_until`` and the model reads
it (`memento.kernels.hf`), so that ``stage`` is one config word; the plan of which trace is trained on when is fixed
before the first step; the loss is reported for blocks, mementos, delimiters and the answer apart.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from memento.command import run_config
from memento.config import SftConfig
from memento.errors import RunFailed, UserError
from memento.format import DELIMITERS
from memento.run import Run, RunStopped


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m memento.sft.train CONFIG [a.b=c ...] [--resume]``. Returns the exit code."""
    return run_config("sft", "One SFT stage.", train, arguments)


def train(config: SftConfig, *, resume: bool = False) -> Path:
    """Run the stage and save the model.

    In a distributed launch (RANK and WORLD_SIZE set, e.g. by torchrun) every rank calls this; rank 0 owns the folder.

    Returns:
        ``config.out / "hf"``: model, tokenizer, chat template, generation config.

    Raises:
        UserError: bad data, model or run folder; nothing is written then.
        RunStopped: a signal; the run was saved and can be resumed.
    """
    _prepare_environment(config)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if config.optimizer == "muon" and config.zero_stage != 0:
        raise UserError("optimizer: muon needs zero_stage: 0 (Muon works on whole matrices, ZeRO shards flatten them).")
    if config.model is not None:
        from memento.preflight import check_model

        check_model(config.model)

    import torch
    from transformers.utils import logging as hf_logging

    from memento.sft.data import pack_steps, training_examples

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    tokenizer, model, added = _load(config)
    # Plain stages keep the tokenizer as it is: rows for tokens that never occur would only be trained away.
    has_delimiters = all(token in tokenizer.get_vocab() for token in DELIMITERS)
    fmt = config.format.bind(tokenizer) if has_delimiters else None
    data, steps = training_examples(config, tokenizer, fmt)
    rows, per_rank = pack_steps(steps, data.lengths, config.micro_batch_tokens, ranks)

    folder = config.out / "hf"
    with Run.open(config, resume=resume) if rank == 0 else nullcontext() as run:
        if run is not None:
            run.total_steps = len(steps)
            run.say(f"{config.stage}: {data.report()}; {len(steps)} steps of {config.batch_size} traces")
            if added:
                run.say(f"added to the tokenizer: {', '.join(added)}")
        trainer = _trainer(config, model, tokenizer, data, rows, len(steps), per_rank, run)
        checkpoint = _last_checkpoint(config.out) if resume else None
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.state.global_step < len(steps):
            torch.distributed.destroy_process_group()
            if run is not None:
                run.stop()
            raise RunStopped(128 + signal.SIGTERM)
        if config.eval.problems is None:
            save_model(trainer, folder)
        elif run is not None:
            best = read_best(config.out)
            os.replace(config.out / "best" / "hf", folder)
            run.say(f"the best checkpoint is that of step {best['step']}: accuracy {best['accuracy']:.3f}")
        if run is not None:
            (config.out / "data.json").write_text(
                json.dumps({"traces": len(data), "dropped": data.dropped, "truncated": data.truncated}) + "\n"
            )
            run.say(f"saved {folder}")
    torch.distributed.destroy_process_group()
    return folder


def _prepare_environment(config: SftConfig) -> None:
    """What must be set before torch, transformers and DeepSpeed are imported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Without these DeepSpeed looks for MPI. torchrun and the like set them before us.
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", str(config.threads or os.cpu_count() or 1))
    # OpenMP's idle threads give their core away instead of spinning, which slows everything down several times where
    # other processes want the cores too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not Path("/proc/driver/nvidia/gpus").is_dir():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # transformers tells accelerate 1 and DeepSpeed the truth; accelerate then says that it goes by DeepSpeed.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)


def _load(config: SftConfig) -> tuple[Any, Any, list[str]]:
    """(tokenizer, model with memento attention, added tokens)."""
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from memento.chat import install_template
    from memento.kernels.hf import attach
    from memento.sft.data import PLAIN_STAGES
    from memento.sft.tokens import add_delimiters
    from memento.tiny import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        source = str(config.model) if config.model is not None else str(write_tiny_model(folder, config.seed))
        tokenizer = AutoTokenizer.from_pretrained(source)
        # Mixed precision keeps fp32 master weights, so the model is loaded in fp32 whatever `dtype` computes in.
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    install_template(tokenizer, config.chat_template)
    added = [] if config.stage in PLAIN_STAGES else add_delimiters(model, tokenizer, config.seed)
    try:
        attach(model)
    except ValueError as error:
        raise UserError(f"{config.model} cannot be trained with memento attention: {error}") from error
    return tokenizer, model, added


def save_model(trainer: Any, folder: Path) -> None:
    """Write the weights as they are now as a plain Hugging Face folder. Every rank calls it: shards are gathered."""
    config, generation = trainer.model.config, trainer.model.generation_config
    before = config.use_cache, generation.eos_token_id
    _settle_for_generation(trainer.model, trainer.processing_class)
    trainer.save_model(str(folder))
    config.use_cache, generation.eos_token_id = before
    if trainer.is_world_process_zero():
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, of no use to whoever loads the model


def read_best(out: Path) -> dict[str, float]:
    """Step and accuracy of the best evaluation of a run so far; accuracy -1 before the first."""
    file = out / "best" / "result.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"step": 0, "accuracy": -1.0}


def evaluate_checkpoint(config: SftConfig, model: Path, result: Path) -> dict[str, float]:
    """``memento evaluate`` on a saved checkpoint, in a process of its own: real rollouts, under eviction in stage 2.

    Returns:
        accuracy, peak KV, blocks and so on, by the names of `metrics.jsonl`.

    Raises:
        RunFailed: the evaluation failed; its own words are in the message.
    """
    asked = config.eval
    options: dict[str, Any] = {
        "problems": asked.problems,
        "samples": asked.samples,
        "temperature": asked.temperature,
        "top-p": asked.top_p,
        "top-k": asked.top_k,
        "max-tokens": asked.max_tokens,
        "seed": config.seed,
        "out": result,
    }
    command = [sys.executable, "-m", "memento.cli", "evaluate", str(model)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    command.append("--evict" if config.stage == "stage2" else "--no-evict")
    settings = {f"rollout.{name}": value for name, value in asked.rollout.items()}
    settings |= {f"format.{name}": value for name, value in config.format.model_dump().items() if value is not None}
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    result.unlink(missing_ok=True)
    outer = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_WAIT_POLICY"}
    clean = {name: value for name, value in os.environ.items() if name not in outer}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunFailed(f"the evaluation of {model} failed: {' '.join(done.stderr.split()[-60:])}")
    found = json.loads(result.read_text(encoding="utf-8"))
    values = {
        "accuracy": found["accuracy"]["mean"],
        "kv_peak_tokens": found["kv"]["peak_tokens"],
        "kv_peak_ratio": found["kv"]["peak_ratio"],
        "blocks_per_trace": found["blocks"]["blocks_per_trace"],
        "malformed_rate": found["blocks"]["malformed_rate"],
        "truncation_rate": found["blocks"]["truncation_rate"],
    }
    return {f"eval/{name}": float(value) for name, value in values.items()}


def _settle_for_generation(model: Any, tokenizer: Any) -> None:
    """What the saved folder says about generating: with a KV cache, and until the assistant's turn ends."""
    from memento.chat import end_of_turn

    model.config.use_cache = True  # the trainer switched it off
    known = model.generation_config.eos_token_id
    ends = [known] if isinstance(known, int) else list(known or [])
    if end_of_turn(tokenizer) not in ends:
        model.generation_config.eos_token_id = [end_of_turn(tokenizer), *ends]


def deepspeed_config(config: SftConfig, per_rank: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a stage; ``per_rank`` rows are accumulated in a step."""
    mixed = {"bf16": {"enabled": config.dtype == "bfloat16"}}
    if config.optimizer == "muon":
        # bf16 mode flattens the master weights; autocast leaves the matrices whole.
        mixed = {"torch_autocast": {"enabled": config.dtype == "bfloat16", "dtype": "bfloat16"}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": per_rank,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,  # ours and torch's AdamW: DeepSpeed's own are compiled at first use
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **mixed,
    }


def _trainer(
    config: SftConfig,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Any],
    rows: list[list[int]],
    steps: int,
    per_rank: int,
    run: Run | None,
) -> Any:
    import deepspeed.ops
    import torch
    from datasets import Dataset
    from torch import nn
    from transformers import PrinterCallback, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from memento.sft.data import Region, RowCollator
    from memento.sft.optimizer import learning_rate, make_optimizer

    ranks = int(os.environ["WORLD_SIZE"])
    # Compiling it takes half a minute, and gloo does as well without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    class Trainer(SFTTrainer):
        """SFTTrainer with our optimiser, our schedule, and the loss of each region of a trace."""

        region: torch.Tensor  # of the row in the forward pass now, [1, T]
        region_loss: torch.Tensor  # sums since the last report, [len(Region)]
        region_tokens: torch.Tensor

        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            if self.optimizer is None:
                self.optimizer = make_optimizer(cast(nn.Module, self.model if model is None else model), config)
            return self.optimizer

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            if self.lr_scheduler is None:
                chosen = self.optimizer if optimizer is None else optimizer
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, learning_rate(config, num_training_steps))
            return self.lr_scheduler

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.region = inputs.pop("region")
            return super().compute_loss(model, inputs, *args, **kwargs)

        def watch(self, _module: Any, _args: Any, outputs: Any) -> None:
            """Sum the loss of each region; TRL's fused head has it per token at the positions before."""
            if outputs.log_probs is None:
                return
            where = self.region[0, 1:]
            self.region_loss.index_add_(0, where.cpu(), -outputs.log_probs.detach()[0].float().cpu())
            self.region_tokens.index_add_(0, where.cpu(), torch.ones(len(where)))

        def take_region_losses(self) -> dict[str, float]:
            """Mean loss of each region since the last call, over all ranks: every one of them calls it."""
            device = next(self.model.parameters()).device  # pyright: ignore[reportOptionalMemberAccess]
            sums = torch.stack([self.region_loss, self.region_tokens]).to(device)
            torch.distributed.all_reduce(sums)
            self.region_loss, self.region_tokens = sums.cpu()
            pairs = zip(Region, self.region_loss.tolist(), self.region_tokens.tolist(), strict=True)
            means = {f"loss/{r.name.lower()}": s / n for r, s, n in pairs if n and r is not Region.PROMPT}
            self.reset_regions()
            return means

        def reset_regions(self) -> None:
            self.region_loss, self.region_tokens = torch.zeros(len(Region)), torch.zeros(len(Region))

    class Reporter(TrainerCallback):
        """Writes metrics and the progress line, evaluates, and turns a signal into a checkpoint and an end."""

        def __init__(self) -> None:
            self.evaluation: dict[str, float] = {}  # of this step, until it is logged

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs is None or "loss" not in logs:
                return
            regions = trainer.take_region_losses()
            if run is None:
                return
            names = {
                "loss": "train/loss",
                "grad_norm": "train/grad_norm",
                "learning_rate": "train/lr",
                "entropy": "train/entropy",
                "mean_token_accuracy": "train/token_accuracy",
                "num_tokens": "train/tokens",
            }
            metrics = {name: float(logs[key]) for key, name in names.items() if key in logs}
            run.log(state.global_step, metrics | regions | self.evaluation)
            self.evaluation = {}

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            stopping = run is not None and run.stopping and state.global_step < state.max_steps
            if ranks > 1:  # a signal may reach one rank only; all must leave the loop together
                flag = torch.tensor([float(stopping)])
                total: Any = trainer.accelerator.reduce(flag.to(trainer.accelerator.device))
                stopping = bool(total.item())
            if stopping:
                control.should_save = control.should_training_stop = True
            elif config.eval.problems is not None:
                at_end = state.global_step == state.max_steps
                if at_end or state.global_step % config.eval.interval == 0:
                    self.evaluate(state.global_step)
                    control.should_log = True

        def evaluate(self, step: int) -> None:
            """Save, evaluate, and keep the checkpoint if none before it did better."""
            candidate = config.out / "candidate"
            save_model(trainer, candidate / "hf")
            if run is not None:
                with run.phase("eval"):
                    self.evaluation = evaluate_checkpoint(config, candidate / "hf", candidate / "evaluation.json")
                accuracy = self.evaluation["eval/accuracy"]
                if accuracy > read_best(config.out)["accuracy"]:
                    (candidate / "result.json").write_text(json.dumps({"step": step, "accuracy": accuracy}) + "\n")
                    shutil.rmtree(config.out / "best", ignore_errors=True)
                    os.replace(candidate, config.out / "best")
            torch.distributed.barrier()

    arguments = SFTConfig(
        output_dir=str(config.out / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=per_rank,
        train_sampling_strategy="sequential",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_grad_norm=config.max_grad_norm,
        bf16=config.dtype == "bfloat16" and config.optimizer != "muon",
        gradient_checkpointing=config.gradient_checkpointing,
        deepspeed=deepspeed_config(config, per_rank),
        use_cpu=os.environ.get("DS_ACCELERATOR") == "cpu",
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no" if config.checkpoint_steps is None else "steps",
        save_steps=config.checkpoint_steps or 500,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
        data_seed=config.seed,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"examples": rows}),
        data_collator=RowCollator(examples),
        processing_class=tokenizer,
        callbacks=[Reporter()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.reset_regions()
    model.register_forward_hook(trainer.watch)
    return trainer


def _last_checkpoint(out: Path) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    folder = out / "checkpoints"
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
