# SPDX-License-Identifier: Apache-2.0
"""What a converted checkpoint's ``config.json`` says of streaming."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from wedlm.algorithm.params import NEXT_TOKENS, DecodeParams, NextToken

# The second is vLLM's own key: its presence makes vLLM plan this many rows a step for each request, none of them AR's.
SETTINGS_KEY, ROWS_KEY = "wedlm_streaming", "canvas_length"


@dataclass(frozen=True, kw_only=True)
class StreamingSettings:
    """Streaming as every request of a server decodes, since vLLM plans the same number of rows for all.

    ``window_size`` (W), ``entropy_threshold`` (τ, nats; None fills one position a step), ``pos_penalty`` (λ) and
    ``next_token`` are as in ``DecodeParams``. ``num_rows``: rows of each request in each step, W + 1 to 2W. A step
    commits up to that many less W tokens while it fills masked positions; what more is filled at the window's start
    takes one further step, which fills nothing. So the number never changes a text. Raises ValueError naming the field.
    """

    window_size: int = 16
    num_rows: int = 32
    entropy_threshold: float | None = 0.4
    pos_penalty: float = 0.02
    next_token: NextToken = "masked"
    mask_token_id: int

    def __post_init__(self) -> None:
        for name, least in (("window_size", 1), ("num_rows", 1), ("mask_token_id", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")
        if not self.window_size < self.num_rows <= 2 * self.window_size:
            raise ValueError(
                f"num_rows is {self.num_rows} for a window of {self.window_size}; expected {self.window_size + 1} to "
                f"{2 * self.window_size}"
            )
        for name in ("entropy_threshold", "pos_penalty"):
            value = getattr(self, name)
            if name == "entropy_threshold" and value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value!r}; expected a number of at least 0")
        if self.next_token not in NEXT_TOKENS:
            raise ValueError(f"next_token is {self.next_token!r}; expected {' or '.join(NEXT_TOKENS)}")

    @property
    def is_causal(self) -> bool:
        return self.next_token == "causal"

    def decode_params(self, max_positions: int) -> DecodeParams:
        """The same as our own engine's parameters."""
        return DecodeParams(
            decoding="streaming",
            window_size=self.window_size,
            entropy_threshold=self.entropy_threshold,
            pos_penalty=self.pos_penalty,
            next_token=self.next_token,
            mask_token_id=self.mask_token_id,
            max_positions=max_positions,
        )

    def to_hf(self) -> dict[str, Any]:
        """The keys of ``config.json``."""
        values = asdict(self)
        return {ROWS_KEY: values.pop("num_rows"), SETTINGS_KEY: values}

    @classmethod
    def from_hf(cls, config: object) -> "StreamingSettings":
        """Read a config's attributes. Raises ValueError if it was not converted, or names an unknown setting."""
        values, num_rows = getattr(config, SETTINGS_KEY, None), getattr(config, ROWS_KEY, None)
        if not isinstance(values, Mapping):
            raise ValueError(
                f"config.json has {SETTINGS_KEY} {values!r}; expected a checkpoint that `python -m wedlm_vllm.convert` "
                "wrote"
            )
        unknown = set(values) - ({field.name for field in fields(cls)} - {"num_rows"})  # which stands outside
        if unknown or "mask_token_id" not in values:
            raise ValueError(
                f"{SETTINGS_KEY} of config.json has {', '.join(sorted(values)) or 'nothing':.200}; expected "
                "mask_token_id and other fields of StreamingSettings"
            )
        return cls(num_rows=num_rows, **values)  # type: ignore[arg-type]
