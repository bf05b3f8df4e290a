# SPDX-License-Identifier: Apache-2.0
"""The places in vLLM that the plug-in relies on: these tests fail when one of them moves.

They read vLLM's files and import none, so that no GPU is needed: of an installed vLLM, or in the folder that
``WEDLM_VLLM_SOURCES`` names (the package itself, which holds ``v1``).
"""

import ast
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[2] / "integrations" / "vllm"
RUNNER = "v1/worker/gpu/model_runner.py"
STATES = "v1/worker/gpu/model_states"
INPUTS = "v1/worker/gpu/input_batch.py"
SCHEDULER = "v1/core/sched/scheduler.py"
ASYNC = "v1/core/sched/async_scheduler.py"
SAMPLING = "v1/worker/gpu/sample/states.py"

# (file, function or class, what it says), as Python's own unparser writes it.
HOOKS = [
    # How the plug-in is found, and its models and their configuration.
    ("plugins/__init__.py", "", ["DEFAULT_PLUGINS_GROUP = 'vllm.general_plugins'"]),
    ("model_executor/models/registry.py", "_ModelRegistry.register_model", ["model_arch: str", "split(':')"]),
    (
        "config/vllm.py",
        "VllmConfig.__post_init__",
        ["self.try_verify_and_update_config()", "self._set_cudagraph_sizes()"],
    ),
    (
        "config/vllm.py",
        "VllmConfig.try_verify_and_update_config",
        ["MODELS_CONFIG_MAP.get(architecture, None)", "cls.verify_and_update_config(self)"],
    ),
    (
        "config/model.py",
        "ModelConfig._try_verify_and_update_model_config",
        ["cls.verify_and_update_model_config(self)"],
    ),
    (
        "model_executor/models/config.py",
        "VerifyAndUpdateConfig",
        [
            "def verify_and_update_config(vllm_config: 'VllmConfig')",
            "def verify_and_update_model_config(model_config: 'ModelConfig')",
        ],
    ),
    ("config/vllm.py", "VllmConfig.num_speculative_tokens", ["return self.diffusion_config.canvas_length"]),
    ("config/vllm.py", "VllmConfig.use_v2_model_runner", ["self.model_config.is_diffusion"]),
    ("config/vllm.py", "VllmConfig", ["speculative_config:", "lora_config:", "kv_transfer_config:"]),
    ("config/diffusion.py", "DiffusionConfig", ["canvas_length: int"]),
    ("config/model.py", "ModelConfig.is_diffusion", ["getattr(self.hf_config, 'canvas_length', None) is not None"]),
    (
        "config/parallel.py",
        "ParallelConfig",
        ["pipeline_parallel_size: int", "decode_context_parallel_size: int", "prefill_context_parallel_size: int"],
    ),
    (
        "config/scheduler.py",
        "SchedulerConfig",
        [
            "max_num_seqs: int",
            "max_num_batched_tokens: int",
            "max_num_scheduled_tokens: int | None",
            "long_prefill_token_threshold: int",
        ],
    ),
    ("config/cache.py", "CacheConfig", ["enable_prefix_caching: bool"]),
    ("sampling_params.py", "SamplingParams.verify", ["self, model_config: ModelConfig,"]),
    (
        "sampling_params.py",
        "SamplingParams",
        [
            "logprobs: int | None = None",
            "prompt_logprobs: int | None = None",
            "logprob_token_ids: ",
            "min_tokens: int = 0",
            "min_p: float = 0.0",
            "presence_penalty: float = 0.0",
            "frequency_penalty: float = 0.0",
            "repetition_penalty: float = 1.0",
            "logit_bias: ",
            "bad_words: ",
            "allowed_token_ids: ",
            "extra_args: ",
        ],
    ),
    ("v1/engine/input_processor.py", "InputProcessor._validate_params", ["params.verify(self.model_config,"]),
    *(
        (f"model_executor/models/{name}.py", f"{name.capitalize()}ForCausalLM.{method}", [])
        for name in ("llama", "qwen2", "qwen3")
        for method in ("forward", "compute_logits", "load_weights")
    ),
    # What the scheduler plans: the rows of a window as drafts, and no token of its own.
    (SCHEDULER, "Scheduler.__init__", ["1 if not vllm_config.model_config.is_diffusion else 0"]),
    (
        SCHEDULER,
        "Scheduler.schedule",
        [
            "self.max_model_len - request.num_computed_tokens - self.num_sampled_tokens_per_step",
            "num_new_tokens + request.num_computed_tokens - request.num_tokens - request.num_output_placeholders",
        ],
    ),
    (
        SCHEDULER,
        "Scheduler.update_from_output",
        [
            "num_accepted = max(len(generated_token_ids) - num_sampled, 0)",
            "request.num_computed_tokens -= num_rejected",
            "request.num_output_placeholders -= num_rejected",
        ],
    ),
    (ASYNC, "AsyncScheduler._update_after_schedule", ["self.num_sampled_tokens_per_step + cur_num_spec_tokens"]),
    ("v1/engine/core.py", "EngineCore.__init__", ["self.use_spec_decode or vllm_config.model_config.is_diffusion"]),
    ("v1/worker/gpu/spec_decode/utils.py", "DraftTokensHandler.get_draft_tokens", ["[-1] * self.num_draft_tokens"]),
    # What the runner calls, and in which order.
    (
        f"{STATES}/__init__.py",
        "init_model_state",
        ["model.get_model_state_cls()", "cls(vllm_config, model, encoder_cache, device)"],
    ),
    (
        f"{STATES}/interface.py",
        "ModelState",
        [
            "def add_request(self, req_index: int, new_req_data: NewRequestData)",
            "def remove_request(self, req_id: str)",
            "def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState)",
            "def custom_sampler(self, sampler: Any)",
            "num_new_sampled_tokens_per_step: int = 1",
        ],
    ),
    (
        f"{STATES}/default.py",
        "DefaultModelState.__init__",
        ["self.max_model_len = ", "self.max_num_reqs = ", "self.device = device"],
    ),
    (f"{STATES}/default.py", "DefaultModelState.prepare_attn", ["max_query_len=max_query_len"]),
    ("v1/worker/gpu/attn_utils.py", "build_attn_metadata", ["causal: bool=True"]),
    (
        RUNNER,
        "GPUModelRunner.load_model",
        [
            "self.num_speculative_steps + self.model_state.num_new_sampled_tokens_per_step",
            "custom = self.model_state.custom_sampler(self.sampler)",
            "self.sampler, self.rejection_sampler = custom",
        ],
    ),
    (
        RUNNER,
        "GPUModelRunner.execute_model",
        [
            "self.finish_requests(scheduler_output)",
            "self.add_requests(scheduler_output)",
            "self.update_requests(scheduler_output)",
            "input_batch = self.prepare_inputs(scheduler_output, batch_desc)",
            "self.prepare_attn(input_batch)",
            "attn_metadata = self.model_state.prepare_attn(",
            "**self.model_state.prepare_inputs(input_batch, self.req_states)",
            "self.cudagraph_manager.run_fullgraph(batch_desc)",
        ],
    ),
    (RUNNER, "GPUModelRunner.finish_requests", ["finished_req_ids.union(preempted_req_ids)"]),
    (
        RUNNER,
        "GPUModelRunner._remove_request",
        ["self.model_state.remove_request(req_id)", "self.req_states.remove_request"],
    ),
    (
        RUNNER,
        "GPUModelRunner.add_requests",
        [
            "self._remove_request(req_id)",
            "self.req_states.add_request(",
            "self.model_state.add_request(req_index, new_req_data)",
            "self.sampler.add_request(req_index, prompt_len, new_req_data.sampling_params)",
        ],
    ),
    (
        RUNNER,
        "GPUModelRunner.prepare_inputs",
        [
            "sorted(num_tokens_per_req, key=num_tokens_per_req.get)",
            "total_num_logits = num_reqs * num_bonus_tokens + total_num_draft_tokens",
            "is_prefilling_np = num_computed_prefill_tokens_np < prefill_len_np",
        ],
    ),
    (
        RUNNER,
        "GPUModelRunner.sample",
        ["hidden_states[input_batch.logits_indices]", "sampler_output = self.sampler(logits, input_batch)"],
    ),
    (RUNNER, "GPUModelRunner.postprocess_sampled", ["self.sampler.penalties_state.output_bin_counts", "post_update("]),
    (RUNNER, "GPUModelRunner.update_max_model_len", ["self.req_states.max_model_len = max_model_len"]),
    (RUNNER, "GPUModelRunner._dummy_sampler_run", ["InputBatch.make_dummy(num_reqs, num_reqs, self.input_buffers)"]),
    (INPUTS, "_post_update_kernel", ["computed_delta = query_len - num_rejected", "for i in range(num_sampled)"]),
    (
        INPUTS,
        "InputBatch",
        [
            "num_reqs: int",
            "idx_mapping_np: np.ndarray",
            "num_scheduled_tokens: np.ndarray",
            "num_draft_tokens_per_req: np.ndarray | None",
            "query_start_loc_np: np.ndarray",
            "prefill_len_np: np.ndarray",
            "num_computed_prefill_tokens_np: np.ndarray",
            "is_prefilling_np: np.ndarray",
            "input_ids: torch.Tensor",
            "positions: torch.Tensor",
        ],
    ),
    ("v1/worker/gpu/states.py", "RequestState.__init__", ["self.req_id_to_index: dict[str, int] = {}"]),
    (
        "v1/worker/gpu/cudagraph_utils.py",
        "ModelCudaGraphManager.capture",
        ["input_buffers.input_ids[:num_tokens]", "input_buffers.positions[:num_tokens]"],
    ),
    # What the sampler reads and returns.
    (
        "v1/worker/gpu/sample/sampler.py",
        "Sampler.__init__",
        ["self.req_states = req_states", "self.sampling_states = "],
    ),
    (
        SAMPLING,
        "SamplingStates.__init__",
        [f"self.{name} = UvaBackedTensor" for name in ("temperature", "top_k", "top_p", "seeds")]
        + ["self.vocab_size = vocab_size"],
    ),
    (SAMPLING, "SamplingStates.add_request", ["top_k = self.vocab_size"]),
    ("v1/worker/gpu/buffer_utils.py", "UvaBackedTensor", ["self.np = ", "self.gpu = "]),
    ("v1/worker/gpu/buffer_utils.py", "async_copy_to_gpu", ["device: torch.device | None=None"]),
    (
        "v1/worker/gpu/sample/output.py",
        "SamplerOutput",
        [f"{name}: " for name in ("sampled_token_ids", "logprobs_tensors", "num_nans", "num_sampled", "num_rejected")],
    ),
    ("v1/worker/gpu/async_utils.py", "AsyncOutput.get_output", ["del token_ids[num_tokens:]"]),
]


def sources() -> Path:
    """The package's folder. Skips the test where there is none."""
    given = os.environ.get("WEDLM_VLLM_SOURCES")
    spec = None if given else find_spec("vllm")
    if not given and (spec is None or spec.origin is None):
        pytest.skip("vLLM is not installed, and WEDLM_VLLM_SOURCES does not name its folder")
    return Path(given) if given else Path(str(spec.origin)).parent  # type: ignore[union-attr]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def find(node: ast.AST, name: str) -> ast.AST | None:
    """The class or function of a dotted name; the module itself for no name."""
    for part in filter(None, name.split(".")):
        inner: Iterator[ast.AST] = ast.iter_child_nodes(node)
        node = next((child for child in inner if getattr(child, "name", None) == part), None)  # type: ignore[assignment]
        if node is None:
            return None
    return node


def in_order(text: str, parts: list[str]) -> list[str]:
    """The parts that do not follow those before them."""
    at, missing = 0, []
    for part in parts:
        found = text.find(part, at)
        at = found + len(part) if found >= 0 else at
        missing += [] if found >= 0 else [part]
    return missing


@pytest.mark.parametrize(("path", "name", "parts"), HOOKS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_hook_is_where_it_was(path, name, parts):
    file = sources() / path
    assert file.is_file(), f"vLLM has no {path}"
    node = find(tree(file), name)
    assert node is not None, f"{path} of vLLM has no {name}"
    text = re.sub(r"\s+", " ", ast.unparse(node))
    ordered = name.startswith("GPUModelRunner.")
    missing = in_order(text, parts) if ordered else [part for part in parts if part not in text]
    assert not missing, f"{path}: {name} of vLLM no longer says {missing}"


def test_the_version_is_the_one_that_was_read():
    folder = sources()
    pinned = re.search(r'"vllm==([^"]+)"', (PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))
    assert pinned is not None
    version = (folder / "_version.py").read_text(encoding="utf-8")
    assert f"'{pinned[1]}" in version.replace('"', "'")


def test_a_hook_that_moved_is_found(tmp_path, monkeypatch):
    """A test of hooks that passes over anything passes always."""
    monkeypatch.setenv("WEDLM_VLLM_SOURCES", str(tmp_path))
    (tmp_path / "a.py").write_text("class A:\n    def f(self, x: int):\n        one()\n        two()\n")
    test_a_hook_is_where_it_was("a.py", "A.f", ["x: int", "two()", "one()"])
    assert in_order("one() two()", ["two()", "one()"]) == ["one()"]
    for path, name, parts in (("b.py", "", []), ("a.py", "A.g", []), ("a.py", "A.f", ["three()"])):
        with pytest.raises(AssertionError, match="vLLM"):
            test_a_hook_is_where_it_was(path, name, parts)
