from memento.kernels.attention import Visibility as Visibility
from memento.kernels.attention import memento_attention as memento_attention
from memento.kernels.logprobs import linear_logprobs as linear_logprobs
