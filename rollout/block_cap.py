"""The block cap: a block that reached its largest length is closed by force.

The position at which it acts is a function of the token ids (`memento.rollout.plan.cap_reached`), so the scheduler
recomputes it, reports it as forced, and notices at once when this processor is not at work.

vLLM has two APIs for logits processors, one for each model runner, and one list of classes for both. `BlockCap` is what
goes into that list: made with the arguments of the V1 API it is a `HostBlockCap`, with those of the V2 API a
`DeviceBlockCap`, which also works while the last sampled token is still on the device (asynchronous scheduling).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1Processor

from memento.format import BlockScanner, MementoFormat
from memento.rollout.options import EvictionOptions
from memento.rollout.plan import EvictionFault, RequestControl, cap_reached

V2_API = find_spec("vllm.v1.worker.gpu.sample.logits_processor") is not None
"""Whether the V2 runner takes logits processors at all: from vLLM 0.31 on."""

if TYPE_CHECKING or V2_API:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2Processor
else:
    V2Processor = object
if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState

_ANY_FORMAT = MementoFormat(0, 1, 2, 3, evict_delimiters=False)


class BlockCap(V1Processor, V2Processor):  # pyright: ignore[reportIncompatibleMethodOverride]
    """One entry of ``logits_processors``; see the module. Rows without a cap cost nothing."""

    def __new__(cls, vllm_config: VllmConfig, *args: Any) -> BlockCap:
        # (device, is_pin_memory) in the V1 API, (req_states,) in the V2 API.
        kind: type[BlockCap] = HostBlockCap if len(args) == 2 else DeviceBlockCap
        return object.__new__(kind)

    def __init__(self, vllm_config: VllmConfig, *args: Any) -> None:
        self._fmt = EvictionOptions.of(vllm_config).fmt

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse malformed ``extra_args["memento"]`` where the request enters, before it reaches the engine."""
        RequestControl.from_extra_args(sampling_params.extra_args, _ANY_FORMAT)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        raise NotImplementedError  # of the V1 API only

    def apply(self, logits: torch.Tensor, *args: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError


class _OpenBlock:
    """Follows one request's tokens; `output_ids` is the runner's own, growing list."""

    def __init__(self, control: RequestControl, prompt_ids: list[int], output_ids: list[int]) -> None:
        self._scanner = BlockScanner(control.fmt)
        for position in range(control.unscanned(len(prompt_ids)), len(prompt_ids)):
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


class HostBlockCap(BlockCap):
    """For the V1 runner: reads the tokens of each capped request on the host."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config)
        self._rows: dict[int, _OpenBlock] = {}

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, self._new_row)

    def _new_row(
        self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> _OpenBlock | None:
        control = RequestControl.from_extra_args(params.extra_args, self._fmt)
        if control.fmt.max_block_tokens is None or prompt_ids is None:
            return None
        return _OpenBlock(control, prompt_ids, output_ids)

    def apply(self, logits: torch.Tensor, *args: Any) -> torch.Tensor:
        full = [row for row, block in self._rows.items() if block.is_full()]
        if full:
            rows = torch.tensor(full, device=logits.device)
            logits[rows] = float("-inf")
            logits[rows, self._fmt.block_end] = 0.0
        return logits


class DeviceBlockCap(BlockCap):
    """For the V2 runner: where a slot's open block begins is a tensor, brought up to date by each sampled token.

    Whether a block is open depends on the last ``<|block_start|>`` or ``<|block_end|>`` alone, whatever else is
    malformed, so one comparison a step suffices.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        super().__init__(vllm_config)
        self._states = req_states
        slots, device = req_states.max_num_reqs, req_states.device
        self._open = torch.full((slots,), -1, dtype=torch.int64, device=device)
        """[slots] content start of the open block, -1 if there is none."""
        self._cap = torch.zeros(slots, dtype=torch.int64, device=device)
        """[slots] the request's cap, 0 for none."""
        self._new: dict[int, RequestControl] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        control = RequestControl.from_extra_args(sampling_params.extra_args, self._fmt)
        self._new[req_idx] = control
        return control.fmt.max_block_tokens is not None

    def apply_staged_writes(self) -> None:
        # A request enters with its prompt, and after a preemption also with what it had generated.
        for slot, control in self._new.items():
            cap = control.fmt.max_block_tokens
            self._cap[slot] = cap or 0
            self._open[slot] = -1
            if cap is None:
                continue
            prompt, known = int(self._states.prompt_len.np[slot]), int(self._states.prefill_len.np[slot])
            first = control.unscanned(prompt)
            tokens = self._states.all_token_ids.gpu[slot, first:known]
            places = torch.nonzero((tokens == self._fmt.block_start) | (tokens == self._fmt.block_end)).flatten()
            if len(places) and bool(tokens[places[-1]] == self._fmt.block_start):
                self._open[slot] = first + places[-1] + 1
        self._new.clear()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext, *args: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        slots, position, token = ctx.expanded_idx_mapping, ctx.pos, ctx.input_ids
        opened = self._open[slots]
        # Tokens below the prefill length were read when the request entered.
        sampled = position >= self._states.prefill_len.gpu[slots]
        opened = torch.where(sampled & (token == self._fmt.block_start), position + 1, opened)
        opened = torch.where(sampled & (token == self._fmt.block_end), -1, opened)
        self._open[slots] = opened
        cap = self._cap[slots]
        full = ((cap > 0) & (opened >= 0) & (position + 1 - opened >= cap))[:, None]
        logits.masked_fill_(full, float("-inf"))
        end = logits[:, self._fmt.block_end, None]
        end.masked_fill_(full, 0.0)
        return logits
