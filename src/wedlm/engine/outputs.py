# SPDX-License-Identifier: Apache-2.0
"""What callers get back."""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from wedlm.engine.original_names import ByName
from wedlm.engine.request import Request, RequestStats, TopLogprobs, WindowSnapshot


@dataclass(frozen=True, slots=True)
class GenerationOutput(ByName):
    """What became of one prompt; fields by attribute or by name in brackets.

    ``finish_reason``: "stop" (end token or stop string), "length", "abort", or "error", which ``error`` explains.
    ``token_steps[i]`` is the forward, counted from 0 after the prompt, that made token i final.
    ``logprobs``, ``top_logprobs`` and ``text_offsets`` (where each token's text begins, in characters, stop strings not
    yet cut off) are there if ``SamplingParams.logprobs`` asked for them.
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
class StreamPiece(ByName):
    """One update of a stream: text that will not change any more, tokens, the forward that made them final.

    The last piece carries the whole ``output``. From an ``AsyncEngine`` only: ``token_texts``, what each token added to
    the text, stop strings not yet cut off; ``logprobs`` and ``top_logprobs`` of the tokens, if asked for; ``window``
    after the step, for requests that asked to watch it.
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
