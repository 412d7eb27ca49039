"""Attention over what a memento trace may still see, log-probabilities without full logits, and their place in
`transformers`.

`memento_attention` is the one entry; `memento.kernels.hf` calls it inside any model that goes through
`transformers`' attention interface; `memento.kernels.logprobs` turns hidden states into log-probabilities.
"""

from memento.links import package

__path__, __getattr__ = package(
    __file__,
    Visibility="memento.kernels.attention",
    memento_attention="memento.kernels.attention",
    linear_logprobs="memento.kernels.logprobs",
)
