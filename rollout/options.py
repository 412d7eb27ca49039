"""The engine-wide settings of eviction, as they travel to every process in ``VllmConfig.additional_config``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from memento.errors import UserError
from memento.format import MementoFormat

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_KEY = "memento"


@dataclass(frozen=True, slots=True)
class EvictionOptions:
    """Attributes:

    fmt: the delimiters and the default eviction of every request.
    max_resident_tokens: physical tokens that one request may hold; None for as many as the pool has.
    reserve_peaks: admit a request only if the expected peak of all running ones fits with it, and preempt only if
        waiting for an eviction does not help (`memento.rollout.admission`); False is vLLM's own admission.
    restart: after an eviction compute everything behind the block again, without it. An ablation: mementos then carry
        only their text, not what they saw (MEMENTO, arXiv 2604.09852, table 3).
    """

    fmt: MementoFormat
    max_resident_tokens: int | None = None
    reserve_peaks: bool = True
    restart: bool = False

    def __post_init__(self) -> None:
        if self.max_resident_tokens is not None and self.max_resident_tokens < 1:
            raise UserError(f"max_resident_tokens must be at least 1 or null, got {self.max_resident_tokens}")

    def to_dict(self) -> dict[str, Any]:
        """JSON, because vLLM hashes and ships ``additional_config``."""
        return asdict(self)

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> EvictionOptions:
        """Read them back from a vLLM configuration.

        Raises:
            UserError: if the engine was not configured by `memento.rollout.eviction_args`.
        """
        config = vllm_config.additional_config
        if not isinstance(config, dict) or CONFIG_KEY not in config:
            raise UserError(
                f'additional_config has no "{CONFIG_KEY}": configure the engine with memento.rollout.eviction_args(fmt)'
            )
        settings = dict(config[CONFIG_KEY])
        return cls(MementoFormat(**settings.pop("fmt")), **settings)
