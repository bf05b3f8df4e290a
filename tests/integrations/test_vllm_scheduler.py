# SPDX-License-Identifier: Apache-2.0
"""vLLM's own configuration and schedulers, over the stand-in for its runner. Needs a vLLM that can be imported, which
may be one without a GPU, such as its Python files with the packages that they import; skipped without it."""

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.engine.tiny_llm import save_tiny
from tests.integrations.fake_vllm import Runner
from tests.stub import StubModel
from wedlm.algorithm import reference

END = 3
BLOCK = 4  # slots of keys


@pytest.fixture(scope="module", params=["masked", "causal"])
def config(request, tmp_path_factory):
    """vLLM's configuration of a converted checkpoint, with the options that a user gives."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            import vllm.platforms
            from vllm.platforms.cpu import CpuPlatform

            # Set before other modules read it, because vLLM finds no device on this machine by itself.
            patch.setattr(vllm.platforms, "_current_platform", CpuPlatform())
            import vllm.config.vllm
            from vllm.engine.arg_utils import EngineArgs
        except ImportError as error:
            pytest.skip(f"vLLM cannot be imported here: {error}")
        import wedlm_vllm
        from wedlm_vllm.convert import convert

        patch.setattr(vllm.config.vllm, "HAS_TRITON", True)  # it will not be called
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        wedlm_vllm.register()
        folder = tmp_path_factory.mktemp("vllm")
        source = save_tiny(folder / "source", model_type="llama", qk_norm=False, block_size=4, next_token=request.param)
        convert(source, folder / "out", window_size=4)
        yield EngineArgs(
            str(folder / "out"),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=100,
            max_num_batched_tokens=128,
        ).create_engine_config()


def test_options_reach_vllm(config):
    from vllm import SamplingParams

    is_causal = config.model_config.hf_config.wedlm_streaming["next_token"] == "causal"
    assert config.model_config.architecture == "WeDLMLlamaForCausalLM"
    assert config.use_v2_model_runner
    assert config.num_speculative_tokens == 8
    assert config.scheduler_config.max_num_seqs == 16
    assert config.cache_config.enable_prefix_caching is not is_causal
    SamplingParams(temperature=0.5).verify(config.model_config, None, None, None)
    for given in ({"logprobs": 1}, {"prompt_logprobs": 1}, {"min_tokens": 3}, {"bad_words": ["a"]}, {"min_p": 0.1}):
        with pytest.raises(ValueError, match=rf"^{next(iter(given))} is"):
            SamplingParams(**given).verify(config.model_config, None, None, None)


@pytest.mark.parametrize("is_async", [False, True])
def test_texts_are_the_references(config, is_async):
    preempted = sum(history(config, is_async, seed) for seed in range(8))
    assert preempted > 0


def history(config, is_async: bool, seed: int) -> int:
    """Run random requests; returns how often one was preempted."""
    import torch
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
    from vllm.v1.request import Request, RequestStatus
    from wedlm_vllm.settings import StreamingSettings

    rng, model = random.Random(seed), StubModel(agreement=6.0, seed=seed)
    settings = replace(
        StreamingSettings.from_hf(config.model_config.hf_config),
        entropy_threshold=rng.choice([None, 1.0, 2.5]),
        mask_token_id=model.mask_token_id,
    )
    length, most, num_blocks = config.model_config.max_model_len, rng.randint(1, 5), rng.choice([45, 200])
    config.scheduler_config.max_num_seqs = most
    config.cache_config.num_gpu_blocks, config.cache_config.block_size = num_blocks, BLOCK
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    keys = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    grammars = SimpleNamespace(should_advance=lambda _: False)
    scheduler = (AsyncScheduler if is_async else Scheduler)(config, keys, grammars, BLOCK)
    runner = Runner(model, settings, length, most, config.scheduler_config.max_num_batched_tokens)
    runner.block_size = BLOCK
    init_none_hash(sha256)
    shared = [rng.choice([0, 1, 2, 4]) for _ in range(3 * BLOCK)]
    requests = []
    for i in range(rng.randint(2, 10)):
        prompt = shared[: rng.choice([1, 5, 12])] + [rng.randrange(12) for _ in range(rng.choice([0, 3, 30]))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.8]),
            top_k=rng.choice([0, 3]),
            seed=i,
            max_tokens=rng.choice([1, 9, 40]),
            stop_token_ids=[END] if rng.random() < 0.5 else [],
            detokenize=False,
        )
        hasher = get_request_block_hasher(BLOCK, sha256)
        requests.append(Request(f"request-{i}", list(prompt), params, None, block_hasher=hasher))
        scheduler.add_request(requests[-1])

    in_flight = []
    for _ in itertools.takewhile(lambda _: scheduler.has_unfinished_requests() or in_flight, range(3000)):
        plan = scheduler.schedule()
        sampled = runner.step(plan_of(plan))
        in_flight.append((plan, sampled))
        while len(in_flight) > (1 if is_async and plan.num_scheduled_tokens else 0):
            plan, sampled = in_flight.pop(0)
            names = list(sampled)
            at = {name: i for i, name in enumerate(names)}
            scheduler.update_from_output(plan, ModelRunnerOutput(names, at, list(sampled.values())))
            if not is_async:
                scheduler.update_draft_token_ids(DraftTokenIds(names, [[-1] * settings.num_rows for _ in names]))
    assert not scheduler.has_unfinished_requests()
    for request in requests:
        params = request.sampling_params
        asked = replace(
            settings.decode_params(length),
            temperature=params.temperature,
            top_k=params.top_k,
            seed=params.seed,
            stop_token_ids=tuple(params.stop_token_ids),
        )
        prompt = list(request.prompt_token_ids)
        expected = reference.decode(model.rows_model, prompt, params.max_tokens, asked).tokens
        same = length - 4 * settings.window_size - len(prompt)
        assert request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
        assert list(request.output_token_ids)[:same] == expected[:same], (seed, request.request_id)
        assert len(request.output_token_ids) == len(expected)
    return sum(request.num_preemptions for request in requests)


def plan_of(output) -> SimpleNamespace:
    """``SchedulerOutput`` as the stand-in reads it."""
    cached = output.scheduled_cached_reqs
    blocks = [[] if new is None else list(new[0]) for new in cached.new_block_ids]
    return SimpleNamespace(
        counts=output.num_scheduled_tokens,
        drafts={name: len(tokens) for name, tokens in output.scheduled_spec_decode_tokens.items()},
        new=output.scheduled_new_reqs,
        cached=list(zip(cached.req_ids, cached.num_computed_tokens, blocks, strict=True)),
        gone=output.finished_req_ids | (output.preempted_req_ids or set()),
    )
