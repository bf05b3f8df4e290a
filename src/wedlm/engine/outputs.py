# SPDX-License-Identifier: Apache-2.0
"""What callers get back."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from wedlm.engine.original_names import ByName
from wedlm.engine.request import Request, RequestStats, TopLogprobs, WindowSnapshot, ratio


@dataclass(frozen=True, slots=True)
class GenerationOutput(ByName):
    """The result for one prompt; read fields as attributes or by name in brackets.

    * ``finish_reason``: "stop" (end token or stop string), "length", "abort", or "error", which ``error`` explains.
    * ``token_steps[i]``: the forward, counted from 0 after the prompt, that made token i final.
    * ``logprobs``, ``top_logprobs`` and ``text_offsets`` are set if ``SamplingParams.logprobs`` asked for them. The
      last says where each token's text begins, in characters, before any stop string is cut off.
    """

    text: str
    token_ids: list[int]
    stats: RequestStats | None
    finish_reason: str
    token_steps: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None
    text_offsets: list[int] | None = None
    error: str | None = None

    @classmethod
    def of(cls, request: Request) -> "GenerationOutput":
        """The output of a finished request."""
        output, asked = request.output, request.params.logprobs
        assert output.text is not None
        assert output.finish_reason is not None
        return cls(
            text=output.text.text,
            token_ids=request.output_token_ids,
            stats=RequestStats.of(request),
            finish_reason=output.finish_reason,
            token_steps=list(output.token_steps),
            logprobs=None if asked is None else list(output.logprobs),
            top_logprobs=list(output.top_logprobs) if asked else None,
            text_offsets=None if asked is None else [0, *output.text.ends][: request.num_output_tokens],
        )

    def record(self, prompt: str) -> dict[str, Any]:
        """The prompt and all there is of its answer, for JSON."""
        record = {"prompt": prompt, **asdict(self)}
        return {name: value for name, value in record.items() if value is not None or name == "stats"}


@dataclass(frozen=True, slots=True)
class Totals:
    """Tokens, forwards and rows of several answers. Each counts its own forwards, also those that it shared."""

    num_tokens: int
    num_forwards: int
    num_rows: int

    @classmethod
    def of(cls, outputs: Iterable[GenerationOutput]) -> "Totals":
        """Of those that ran."""
        stats = [output.stats for output in outputs if output.stats is not None]
        return cls(*(sum(getattr(one, part.name) for one in stats) for part in fields(cls)))

    @property
    def tokens_per_forward(self) -> float:
        return ratio(self.num_tokens, self.num_forwards)

    @property
    def p_cache(self) -> float:
        """Tokens for each row run."""
        return ratio(self.num_tokens, self.num_rows)


@dataclass(frozen=True, slots=True)
class StreamPiece(ByName):
    """One update of a stream: text that will not change any more, its tokens, and the forward that made them final.

    The last piece has the whole ``output``. Only an ``AsyncEngine`` sets these: ``token_texts``, what each token added
    to the text, before any stop string is cut off; ``logprobs`` and ``top_logprobs`` of the tokens, if requested;
    ``window`` after the step, for requests that watch it.
    """

    also: ClassVar = {
        "new_text": lambda piece: piece.text,
        "new_token_ids": lambda piece: piece.token_ids,
        "is_finished": lambda piece: piece.output is not None,
        "stats": lambda piece: None if piece.output is None else piece.output.stats,
    }

    text: str
    token_ids: list[int]
    step: int
    output: GenerationOutput | None
    token_texts: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    window: WindowSnapshot | None = None
