"""Memento attention inside `transformers` models.

One call makes a model read ``visible_until``::

    model = AutoModelForCausalLM.from_pretrained(folder)
    attach(model)
    model(input_ids=..., position_ids=..., visible_until=..., document=...)     # all [B, T]

`attach` registers the attention with `transformers`, selects it, and installs a hook on the decoder that turns the
keywords into one `Visibility`. All layers share that object, so that masks are built once a batch; gradient
checkpointing, DeepSpeed and trainers see an ordinary model. `PackedPolicy` wraps such a model for the learner.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from memento.format import lowest_visible
from memento.kernels.attention import Visibility, attend
from memento.kernels.logprobs import linear_logprobs

ATTENTION = "memento"
"""The name under which the attention is registered (``attn_implementation="memento"``)."""

PADDING_DOCUMENT = -1
"""The document id of padding tokens."""


def register() -> None:
    """Make ``attn_implementation="memento"`` known to `transformers`. Does nothing the second time."""
    AttentionInterface.register(ATTENTION, _attention_forward)
    AttentionMaskInterface.register(ATTENTION, _no_mask)


def attach(model: PreTrainedModel) -> None:
    """Switch `model` to memento attention. Afterwards every call needs ``visible_until=[B, T]``.

    The model's call then takes, beside ``input_ids`` and ``position_ids``, all int64 [B, T]:

    * ``visible_until``: row positions, see `memento.kernels.attention`;
    * ``document`` (optional): ids of packed documents;
    * ``attention_mask`` (optional, 2D): where it is 0 the token is padding. Not together with ``document``;
    * ``memento_implementation`` (optional): as for `memento_attention`.

    The call runs with ``use_cache=False``: with a cache `transformers` silently ignores packing. Layers with a sliding
    window see the last so many *resident* keys (`memento.format.lowest_visible`), as they do in an engine that evicts.

    Args:
        model: any causal language model that goes through `transformers`' attention interface.

    Raises:
        ValueError: layers of another kind than full or sliding attention, or attention dropout.
    """
    config = model.config.get_text_config()
    layer_types, window = set(getattr(config, "layer_types", None) or []), getattr(config, "sliding_window", None)
    if not layer_types and window:
        layer_types = {"sliding_attention"}
    if unsupported := layer_types - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{type(model).__name__} has {', '.join(sorted(unsupported))} layers; memento attention supports "
            "full_attention and sliding_attention layers only."
        )
    if getattr(config, "attention_dropout", 0.0):
        raise ValueError(
            f"attention_dropout is {config.attention_dropout}; set it to 0 in the model's config.json: with dropout "
            "the learner's log-probabilities would never equal the sampler's."
        )
    register()
    model.set_attn_implementation(ATTENTION)

    decoder: Any = model.get_decoder()
    decoder._memento_window = window if "sliding_attention" in layer_types else None
    if _see not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_see, with_kwargs=True)


def _see(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The decoder's forward pre-hook: the keywords of a call become the `Visibility` that every layer receives."""
    kwargs = dict(kwargs)
    until, document = kwargs.pop("visible_until", None), kwargs.pop("document", None)
    if until is None:
        raise ValueError("a model with memento attention needs visible_until=[B, T] in its call")
    padding = kwargs.pop("attention_mask", None)
    if padding is not None:
        if padding.ndim != 2 or document is not None:
            raise ValueError("pass either document=[B, T] or a 2D attention_mask (1 token, 0 padding), not both")
        document = None if bool(padding.all()) else torch.where(padding.bool(), 0, PADDING_DOCUMENT)
    lowest, window = kwargs.pop("lowest_visible", None), getattr(_module, "_memento_window", None)
    visibility = sliding = Visibility(until, lowest, document)
    if lowest is None and window is not None and window < until.shape[1]:
        sliding = Visibility(until, _window_starts(until, document, window), document)
    seen = {"visibility": visibility, "sliding_visibility": sliding}
    return args, kwargs | {"attention_mask": None, "use_cache": False} | seen


def _window_starts(until: torch.Tensor, document: torch.Tensor | None, window: int) -> torch.Tensor:
    """`memento.format.lowest_visible` of each document of each row, in row positions, int64 [B, T]."""
    limits_BT = until.numpy(force=True)
    documents_BT = np.zeros_like(limits_BT) if document is None else document.numpy(force=True)
    lowest_BT = np.empty_like(limits_BT)
    for limits, documents, lowest in zip(limits_BT, documents_BT, lowest_BT, strict=True):
        cuts = np.flatnonzero(np.diff(documents)) + 1
        for start, end in pairwise([0, *cuts.tolist(), len(limits)]):
            lowest[start:end] = lowest_visible(limits[start:end] - start, window) + start
    return torch.from_numpy(lowest_BT).to(until.device)


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    visibility: Visibility | None = None,
    sliding_visibility: Visibility | None = None,
    sliding_window: int | None = None,
    memento_implementation: str | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """`transformers`' attention interface: [B, H, T, D] in, [B, T, H, D] out."""
    if visibility is None:
        raise ValueError(
            f"{type(module).__name__} was given no visibility; prepare the model with memento.kernels.hf.attach(model)"
        )
    if sliding_window is not None and sliding_visibility is not None:
        visibility = sliding_visibility
    out = attend(query, key, value, visibility, scale=scaling, implementation=memento_implementation)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*_: object, **__: object) -> None:
    """`transformers`' mask interface. The mask comes from `Visibility`, so there is nothing to build."""


def pack(
    documents: Sequence[Sequence[int] | NDArray[np.integer]],
    visible_until: Sequence[Sequence[int] | NDArray[np.int64]],
    pad_to: int | None = None,
    pad_id: int = 0,
) -> dict[str, torch.Tensor]:
    """Pack documents into one row [1, T] without padding between them: the keywords of an attached model's call.

    Args:
        documents: token ids of each document.
        visible_until: for each document as `memento.format.visible_until` gives it (document positions).
        pad_to: fill the row up to this length with `pad_id`, as a document of its own.

    Returns:
        int64 [1, T]: ``input_ids``, ``position_ids`` (from 0 in each document), ``visible_until`` (row positions) and
        ``document`` (0, 1, ...; padding `PADDING_DOCUMENT`).

    Raises:
        ValueError: lengths that do not agree, or more tokens than `pad_to`.
    """
    if [len(d) for d in documents] != [len(u) for u in visible_until]:
        raise ValueError("documents and visible_until must have the same lengths")
    ids, positions, until, document = [], [], [], []
    offset = 0
    for index, (tokens, limits) in enumerate(zip(documents, visible_until, strict=True)):
        ids.append(torch.as_tensor(tokens, dtype=torch.int64))
        positions.append(torch.arange(len(tokens)))
        until.append(torch.as_tensor(limits, dtype=torch.int64) + offset)
        document.append(torch.full((len(tokens),), index))
        offset += len(tokens)
    if pad_to is not None:
        if offset > pad_to:
            raise ValueError(f"{offset} tokens do not fit into a row of {pad_to}")
        rest = pad_to - offset
        ids.append(torch.full((rest,), pad_id))
        positions.append(torch.arange(rest))
        until.append(torch.full((rest,), torch.iinfo(torch.int64).max))
        document.append(torch.full((rest,), PADDING_DOCUMENT))
    columns = {"input_ids": ids, "position_ids": positions, "visible_until": until, "document": document}
    return {name: torch.cat(parts)[None] for name, parts in columns.items()}


class PackedPolicy(nn.Module):
    """A causal language model whose forward gives the log-probability of each token of packed rows.

    The module to hand to DeepSpeed: its forward is all that training needs, and no full logits exist in it. The model
    itself, for saving, is `.model`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        attach(model)
        if model.get_output_embeddings() is None:
            raise ValueError(f"{type(model).__name__} has no output head")
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        visible_until: torch.Tensor,
        document: torch.Tensor,
        temperature: float = 1.0,
        chunk_tokens: int = 1024,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy at each token, given the tokens before it.

        Args:
            input_ids, position_ids, visible_until, document: int64 [1, T], as `pack` makes them.
            temperature: the sampling temperature; divides the logits.
            chunk_tokens: see `linear_logprobs`.

        Returns:
            (logprobs_T, entropy_T), fp32 [T]: at position t the log-probability of ``input_ids[0, t]``, and the
            entropy of the distribution it was drawn from. Position 0 of each document has no distribution: there both
            are 0, and no loss mask may select it.
        """
        hidden_TD = self.model.get_decoder()(
            input_ids=input_ids, position_ids=position_ids, visible_until=visible_until, document=document
        ).last_hidden_state[0]
        head_VD = cast(nn.Linear, self.model.get_output_embeddings()).weight
        logprobs, entropy = linear_logprobs(hidden_TD[:-1], head_VD, input_ids[0, 1:], temperature, chunk_tokens)
        same = document[0, 1:] == document[0, :-1]
        return tuple(nn.functional.pad(torch.where(same, x, 0.0), (1, 0)) for x in (logprobs, entropy))  # pyright: ignore[reportReturnType]
