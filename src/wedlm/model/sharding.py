# SPDX-License-Identifier: Apache-2.0
"""Which part of a model's weights one rank of tensor parallelism holds, by their names in a checkpoint.

The outputs of q, k, v, gate and up are divided (column shards), and so are the inputs of o and down that come from them
(row shards), so that a layer needs two sums over the ranks. Embedding and output projection are divided by the
vocabulary. If there are fewer key/value heads than ranks, the ranks that share one each hold it. Everything else is on
every rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from wedlm.model.config import ModelConfig
from wedlm.model.formats.cut import Cut

_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_COLUMNS = ("o_proj", "down_proj")
_BY_VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of rank ``rank`` of ``size`` in a model of the whole config ``whole``. Raises ValueError if its heads or
    its feed-forward layers cannot be divided this way."""

    whole: ModelConfig
    rank: int
    size: int

    def __post_init__(self) -> None:
        check_divides(self.whole, self.size)

    @property
    def config(self) -> ModelConfig:
        """The shape of this rank's part. Its token ids are meaningless."""
        whole, vocabulary = self.whole, self.vocabulary
        return replace(
            whole,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=max(1, whole.num_kv_heads // self.size),
            intermediate_size=whole.intermediate_size // self.size,
            vocab_size=vocabulary.stop - vocabulary.start,
            mask_token_id=None,
            bos_token_id=None,
            eos_token_ids=(),
        )

    @property
    def vocabulary(self) -> slice:
        """The token ids whose rows of the embedding and of the output projection are here."""
        size = self.whole.vocab_size
        return slice(size * self.rank // self.size, size * (self.rank + 1) // self.size)

    @property
    def widest_vocabulary(self) -> int:
        """The largest vocabulary of any rank."""
        return -(-self.whole.vocab_size // self.size)

    def cut(self, name: str, shape: tuple[int, ...]) -> Cut:
        """The part of the tensor of that name, whose whole shape is ``shape``."""
        module, _, _ = name.rpartition(".")
        kind = module.rpartition(".")[2]
        if kind in _BY_VOCABULARY:
            return Cut(shape, self.vocabulary)
        if kind in _BY_ROWS:
            return Cut(shape, self._outputs(kind))
        if kind in _BY_COLUMNS and len(shape) == 1:
            return Cut(shape, counts=self.rank == 0)
        if kind in _BY_COLUMNS:
            return Cut(shape, columns=self._even(shape[1]))
        return Cut(shape)

    def low_rank(self, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of a LoRA (A [r, in], B [out, r]) for the weight of that name. For a row shard A is cut, and
        the products B A of all ranks add up to the whole's."""
        cut = self.cut(name, (len(b), a.shape[1]))
        return a[:, cut.columns], b[cut.rows]

    def _outputs(self, kind: str) -> slice:
        whole = self.whole
        if kind in ("gate_proj", "up_proj"):
            return self._even(whole.intermediate_size)
        if kind == "q_proj":
            return self._even(whole.num_heads * whole.head_dim)
        first = whole.num_kv_heads * self.rank // self.size
        return slice(first * whole.head_dim, (first + self.config.num_kv_heads) * whole.head_dim)

    def _even(self, length: int) -> slice:
        return slice(length // self.size * self.rank, length // self.size * (self.rank + 1))


def check_divides(config: ModelConfig, size: int) -> None:
    """Raises ValueError unless a model of this config can be divided among that many ranks."""
    parts: Mapping[str, int] = {"attention heads": config.num_heads, "intermediate size": config.intermediate_size}
    for name, number in parts.items():
        if number % size:
            raise ValueError(f"tensor_parallel_size is {size}; expected a divisor of the model's {number} ({name})")
    if config.num_kv_heads % size and size % config.num_kv_heads:
        raise ValueError(
            f"tensor_parallel_size is {size}; expected a divisor or a multiple of the model's {config.num_kv_heads} "
            "key/value heads"
        )
    if config.vocab_size < size:
        raise ValueError(f"tensor_parallel_size is {size}; expected at most the {config.vocab_size} token ids")
