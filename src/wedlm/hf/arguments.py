# SPDX-License-Identifier: Apache-2.0
"""The arguments of ``generate``: transformers' names and ours, and which of transformers' names have no
meaning here."""

import inspect
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, fields
from typing import Any

from transformers import GenerationConfig, GenerationMixin, MaxTimeCriteria, StopStringCriteria

from wedlm.algorithm.params import DecodeParams, Decoding, NextToken
from wedlm.engine.sampling_params import SamplingParams

# Nothing of these can change which tokens come, or in which form.
_HARMLESS = {"bos_token_id", "cache_config", "cache_implementation", "compile_config", "disable_compile", "low_memory"}
_HARMLESS |= {"max_cache_len", "prefill_chunk_size", "synced_gpus", "transformers_version", "_from_model_config"}
# Values with which an option does nothing; others are None, False and what is empty.
_NEUTRAL = {"num_beams": 1, "num_beam_groups": 1, "use_cache": True, "typical_p": 1, "length_penalty": 1}
_NEUTRAL |= {"no_repeat_ngram_size": 0, "epsilon_cutoff": 0, "eta_cutoff": 0, "diversity_penalty": 0}
_NEUTRAL |= {"encoder_repetition_penalty": 1, "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1}
_KNOWN = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments; None takes the default of ``SamplingParams``, the engine or the model."""

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int = DecodeParams.top_k
    top_p: float = DecodeParams.top_p
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    num_return_sequences: int = 1
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    stop_strings: str | list[str] | None = None
    max_time: float | None = None
    decoding: Decoding | None = None
    wedlm_window_size: int = DecodeParams.window_size
    wedlm_entropy_threshold: float | None = DecodeParams.entropy_threshold
    wedlm_pos_penalty_factor: float = DecodeParams.pos_penalty
    wedlm_next_token: NextToken | None = None
    wedlm_draft_entropy: float = DecodeParams.draft_entropy
    wedlm_lookup_drafts: int | None = None

    @classmethod
    def of(cls, generation_config: GenerationConfig | None, given: Mapping[str, Any]) -> "Arguments":
        """The arguments given, over what the config says. Raises ValueError for arguments that would change the answer
        in an unsupported way."""
        values = {} if generation_config is None else dict(generation_config.to_diff_dict())
        known = {field.name for field in fields(cls)}
        own = {}
        for name, value in {**values, **given}.items():
            if name in known:
                if value is not None or name == "wedlm_entropy_threshold":  # for which None means no limit
                    own[name] = value
            elif name not in _HARMLESS and not (name in _KNOWN and _does_nothing(name, value)):
                raise ValueError(
                    f"{name} is {value!r}, which this generate does not support; expected options of "
                    "wedlm.SamplingParams (max_new_tokens and min_new_tokens for max_tokens and min_tokens)"
                )
        if given.get("max_new_tokens") is not None:  # which is nearer than a config's other limit
            own.pop("max_length", None)
        return cls(**own)

    def sampling_params(self, num_rows: int) -> SamplingParams:
        """The parameters for prompts of ``num_rows`` rows, padding included. Raises ValueError."""
        new = self.max_new_tokens
        if new is None:
            if self.max_length is None:
                raise ValueError("max_new_tokens is missing; expected it, or max_length")
            new = self.max_length - num_rows
            if new < 1:
                raise ValueError(
                    f"max_length is {self.max_length}; expected more than {num_rows}, the rows of input_ids"
                )
        params = SamplingParams(
            max_tokens=new,
            min_tokens=self.min_new_tokens,
            temperature=self._temperature(),
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            wedlm_entropy_threshold=self.wedlm_entropy_threshold,
            wedlm_pos_penalty_factor=self.wedlm_pos_penalty_factor,
            wedlm_next_token=self.wedlm_next_token,
            wedlm_draft_entropy=self.wedlm_draft_entropy,
            wedlm_lookup_drafts=self.wedlm_lookup_drafts,
        )
        count = self.num_return_sequences
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"num_return_sequences is {count!r}; expected an integer >= 1")
        if count > 1 and params.temperature == 0:
            raise ValueError(
                f"num_return_sequences is {count} without sampling; expected do_sample, or all would be equal"
            )
        return params

    def criteria(self, given: Sequence[Any] | None, tokenizer: Any) -> list[Any]:
        """The caller's stopping criteria, and those that other options imply. Raises ValueError."""
        found = list(given or ())
        if self.stop_strings is not None:
            if tokenizer is None:
                raise ValueError(f"stop_strings is {self.stop_strings!r} without tokenizer; expected tokenizer=...")
            found.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=self.stop_strings))
        if self.max_time is not None:
            found.append(MaxTimeCriteria(max_time=self.max_time))
        return found

    def _temperature(self) -> float:
        if self.temperature is None:
            return 1.0 if self.do_sample else 0.0
        if self.do_sample is not None and self.do_sample is not (self.temperature > 0):
            raise ValueError(
                f"do_sample is {self.do_sample!r} and temperature {self.temperature!r}; expected one that fits the "
                "other"
            )
        return self.temperature


def _does_nothing(name: str, value: Any) -> bool:
    if value is None or value is False or (isinstance(value, Sized) and not len(value)):
        return True
    return isinstance(value, int | float) and name in _NEUTRAL and value == _NEUTRAL[name]
