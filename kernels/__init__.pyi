from memento.kernels.attention import Visibility as Visibility
from memento.kernels.attention import memento_attention as memento_attention
from memento.kernels.compaction import Moves as Moves
from memento.kernels.compaction import PagedCache as PagedCache
from memento.kernels.compaction import compact as compact
from memento.kernels.logprobs import linear_logprobs as linear_logprobs
from memento.kernels.traces import trace_visibility as trace_visibility
