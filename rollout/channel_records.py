"""What the ends of a weight channel tell each other (`memento.rollout.weight_channel`).

Without torch: an engine's actor reads this before it sets the environment that torch reads when it is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from memento.errors import RunFailed
from memento.problems import Record

if TYPE_CHECKING:
    import torch

LOOPBACK = "127.0.0.1"


class ChannelBroken(RunFailed):
    """The weights did not arrive. The message names the stage. The channel is unusable."""


class TensorSpec(Record):
    """A tensor that is sent: Hugging Face's name, torch's name of its type, its whole shape, and its size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorSpec:
        """That of a whole tensor."""
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        return cls(name=name, dtype=dtype, shape=shape, bytes=tensor.numel() * tensor.element_size())


class ChannelSettings(Record):
    """What all ends of a channel agree on.

    Attributes:
        transport: see the module.
        address, port: of the store where the ends find each other; the first sender keeps it.
        senders: learner ranks in the channel, the first of its ranks: one for broadcast, all for ipc.
        receivers: workers of engines, the ranks behind them.
        tensors: what every update sends, in this order.
        bucket_bytes: sent at a time; a larger tensor is a bucket of its own.
        timeout_s: for the other ends to appear, and for each bucket.
    """

    transport: Literal["broadcast", "ipc"]
    address: str
    port: int
    senders: int = Field(gt=0)
    receivers: int = Field(gt=0)
    tensors: tuple[TensorSpec, ...]
    bucket_bytes: int = Field(gt=0)
    timeout_s: float = Field(gt=0)


class ChannelUpdate(Record):
    """Weights that are sent through the channel now. As `memento.rollout.weights.WeightUpdate`, but for once only: an
    engine that was not listening cannot get them any more.

    Attributes:
        version: see `WeightUpdate`.
        bytes: of all tensors.
        seconds: what it took to gather and send them; 0 before they were.
    """

    version: int = Field(ge=0)
    bytes: int
    seconds: float = 0.0


def address_for(other: str) -> str:
    """This machine's address for somebody at `other`: the loopback where that is one, else the address Ray uses."""
    import ray

    return other if other == LOOPBACK else ray.util.get_node_ip_address()
