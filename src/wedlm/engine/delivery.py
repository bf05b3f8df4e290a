# SPDX-License-Identifier: Apache-2.0
"""Append a step's tokens to a request's output, up to the one that ends it. Only this module decides why a request
ends."""

from wedlm.engine.plan import WindowResult
from wedlm.engine.request import FinishReason, Request


def append_tokens(request: Request, result: WindowResult) -> FinishReason | None:
    """Append emitted tokens, and drop everything after the one that ends the request. Returns why it ends, or None."""
    output, step = request.output, request.counters.num_forwards - 1
    for i, token in enumerate(result.tokens):
        if output.constraint is not None and not output.constraint.accept(token):
            return "length"  # the grammar met its limits of work: cut, but valid so far
        output.tokens.append(token)
        output.logprobs.append(result.logprobs[i])
        output.token_steps.append(step)
        if result.top_logprobs:
            output.top_logprobs.append(result.top_logprobs[i])
        reason = _finish_reason(request, token)
        if reason is not None:
            return reason
    return None


def _finish_reason(request: Request, token: int) -> FinishReason | None:
    """Whether the token that was just appended ends the request."""
    text, constraint = request.output.text, request.output.constraint
    if token in request.decode.stop_token_ids:
        if text is not None:
            text.finish()  # the end token is reported as an id; it is not part of the text
        return "stop"
    num_tokens = request.num_output_tokens
    if text is not None and text.push(token, num_tokens >= request.params.min_tokens):
        return "stop"
    if constraint is not None and constraint.complete:
        if text is not None:
            text.finish()
        return "stop"
    return "length" if num_tokens == request.max_tokens else None
