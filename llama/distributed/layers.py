"""The three layers that are split over ranks (tensor parallelism).

Megatron's scheme (Shoeybi et al., 2019, section 3): a column-parallel layer holds a slice of the
outputs, the row-parallel layer after it the matching slice of the inputs, so that a pair of them
needs one all-reduce. Classes and shapes are fairscale's. The forward passes are ours: fairscale's
mark tensors dirty for autograd and index with boolean masks, which torch.compile and CUDA graphs
can't capture. So are the constructors: fairscale's ignore the default device (nothing can be built
on "meta") and, with several ranks, initialize a full-size master weight.
"""

from collections.abc import Callable

import fairscale.nn.model_parallel.layers as fairscale_layers
import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.utils import VocabUtility, divide_and_check_no_remainder
from torch import nn

from llama.distributed.groups import current_groups

# A linear layer's matmul, which accel may replace with an equivalent one.
LinearFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _weight(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns), requires_grad=False)


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):
    """x @ W.T with the rows of W (the outputs) split over ranks."""

    linear: LinearFunction = staticmethod(F.linear)

    def __init__(self, in_features: int, out_features: int, gather_output: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.gather_output = gather_output
        self.groups = current_groups()
        self.output_size_per_partition = divide_and_check_no_remainder(
            out_features, self.groups.size
        )
        self.weight = _weight(self.output_size_per_partition, in_features)
        self.register_parameter("bias", None)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        y = self.linear(input_, self.weight)
        return self.groups.all_gather_last_dim(y) if self.gather_output else y


class RowParallelLinear(fairscale_layers.RowParallelLinear):
    """x @ W.T with the columns of W (the inputs) split over ranks, whose results are summed."""

    linear: LinearFunction = staticmethod(F.linear)

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.input_is_parallel = True
        self.groups = current_groups()
        self.input_size_per_partition = divide_and_check_no_remainder(in_features, self.groups.size)
        self.weight = _weight(out_features, self.input_size_per_partition)
        self.register_parameter("bias", None)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        return self.groups.all_reduce(self.linear(input_, self.weight))


class VocabParallelEmbedding(fairscale_layers.VocabParallelEmbedding):
    """Embedding with the vocabulary split over ranks, whose results are summed.

    Attributes:
        out_dtype: dtype of the result; None for the weight's.
    """

    out_dtype: torch.dtype | None = None

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.groups = current_groups()
        self.vocab_start_index, self.vocab_end_index = (
            VocabUtility.vocab_range_from_global_vocab_size(
                num_embeddings, self.groups.rank, self.groups.size
            )
        )
        self.num_embeddings_per_partition = self.vocab_end_index - self.vocab_start_index
        self.weight = _weight(self.num_embeddings_per_partition, embedding_dim)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        if self.groups.size == 1:
            return F.embedding(input_, self.weight).to(self.out_dtype)
        local = input_ - self.vocab_start_index
        elsewhere = (local < 0) | (local >= self.num_embeddings_per_partition)
        y = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        y = self.groups.all_reduce(y.masked_fill(elsewhere[..., None], 0))
        return y.to(self.out_dtype)
