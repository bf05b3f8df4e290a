# SPDX-License-Identifier: Apache-2.0
"""Greedy continuations by llama.cpp (the wheel ``xllamacpp``) in a process of its own, whose server nothing ends.

A line of JSON on standard input, {"model": path, "prompts": lists of token ids, "max_tokens": n}, gives one on standard
output: the tokens of each prompt's continuation, and the prompts' texts tokenised by llama.cpp.
"""

import json
import os
import sys
import urllib.request

import xllamacpp


def main() -> None:
    task = json.loads(sys.stdin.readline())
    params = xllamacpp.CommonParams()
    params.model.path = task["model"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.fit_params, params.warmup, params.verbosity = False, False, 0
    server = xllamacpp.Server(params)

    def ask(path: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"{server.listening_address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    options = {"n_predict": task["max_tokens"], "temperature": 0, "return_tokens": True, "cache_prompt": False}
    tokens = [ask("completion", {"prompt": prompt, **options})["tokens"] for prompt in task["prompts"]]
    encoded = [ask("tokenize", {"content": text, "parse_special": True})["tokens"] for text in task["texts"]]
    chat = ask("apply-template", {"messages": task["messages"]})["prompt"]
    print(json.dumps({"tokens": tokens, "encoded": encoded, "chat": chat}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
