# SPDX-License-Identifier: Apache-2.0
"""Many streams of a server at once."""

import asyncio
from typing import Any

import httpx2

from tests.server.asking import TEXT
from tests.server.running import MODEL, Running, events

Chunks = list[dict[str, Any]]


async def stream(client: httpx2.AsyncClient, prompt: str, **options) -> Chunks:
    """The chunks of a stream that must end well."""
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, "stream": True, **options}
    answer = await client.post(TEXT, json=body)
    assert answer.status_code == 200, answer.text
    chunks = events(answer)
    assert chunks[-1]["choices"][0]["finish_reason"] in ("length", "stop"), chunks[-1]
    return chunks


def all_streams(running: Running, prompts: list[str], **options) -> list[Chunks]:
    async def main() -> list[Chunks]:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=running.url, timeout=3600, limits=limits) as client:
            return await asyncio.gather(*(stream(client, prompt, **options) for prompt in prompts))

    return asyncio.run(main())


def text_of(chunks: Chunks) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)
