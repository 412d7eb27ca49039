"""The block cap: a block that reached its largest length is closed by force (V1 logits-processor API).

The position at which it acts is a function of the token ids (`memento.rollout.plan.cap_reached`), so the scheduler
recomputes it, reports it as forced, and notices at once when this processor is not at work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor

from memento.format import BlockScanner, MementoFormat
from memento.rollout.options import EvictionOptions
from memento.rollout.plan import EvictionFault, RequestControl, cap_reached

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

_ANY_FORMAT = MementoFormat(0, 1, 2, 3, evict_delimiters=False)


class _OpenBlock:
    """Follows one request's tokens; `output_ids` is the runner's own, growing list."""

    def __init__(self, control: RequestControl, prompt_ids: list[int], output_ids: list[int]) -> None:
        self._scanner = BlockScanner(control.fmt)
        for position in range(control.prompt_len, len(prompt_ids)):
            self._scanner.feed(position, prompt_ids[position])
        self._prompt_len, self._output_ids, self._read = len(prompt_ids), output_ids, 0

    def is_full(self) -> bool:
        """Whether the next token must close the block."""
        for index in range(self._read, len(self._output_ids)):
            if self._output_ids[index] < 0:
                raise EvictionFault("the block cap needs the sampled tokens, and one is still in flight")
            self._scanner.feed(self._prompt_len + index, self._output_ids[index])
        self._read = len(self._output_ids)
        return cap_reached(self._scanner, self._prompt_len + self._read)


class BlockCap(LogitsProcessor):
    """One entry of ``logits_processors``; rows without a cap cost nothing."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse malformed ``extra_args["memento"]`` where the request enters, before it reaches the engine."""
        RequestControl.from_extra_args(sampling_params.extra_args, _ANY_FORMAT)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._fmt = EvictionOptions.of(vllm_config).fmt
        self._rows: dict[int, _OpenBlock] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, self._new_row)

    def _new_row(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> _OpenBlock | None:
        control = RequestControl.from_extra_args(params.extra_args, self._fmt)
        if control.fmt.max_block_tokens is None or prompt_ids is None:
            return None
        return _OpenBlock(control, prompt_ids, output_ids)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        full = [row for row, block in self._rows.items() if block.is_full()]
        if full:
            rows = torch.tensor(full, device=logits.device)
            logits[rows] = float("-inf")
            logits[rows, self._fmt.block_end] = 0.0
        return logits
