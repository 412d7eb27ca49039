"""Attention over what a memento trace may still see, log-probabilities without full logits, the moves that evict a
block from a paged KV cache, and their place in `transformers`.

`memento_attention` is the one entry to attention; `memento.kernels.hf` calls it inside any model that goes through
`transformers`' attention interface. `trace_visibility` makes what it needs from token ids on a device;
`linear_logprobs` turns hidden states into log-probabilities; `compact` moves the kept tokens of a KV cache.
docs/kernels.md says which implementation is for what.
"""

from memento.links import package

__path__, __getattr__ = package(
    __file__,
    Visibility="memento.kernels.attention",
    memento_attention="memento.kernels.attention",
    trace_visibility="memento.kernels.traces",
    linear_logprobs="memento.kernels.logprobs",
    Moves="memento.kernels.compaction",
    PagedCache="memento.kernels.compaction",
    compact="memento.kernels.compaction",
)
