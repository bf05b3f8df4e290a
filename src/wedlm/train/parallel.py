# SPDX-License-Identifier: Apache-2.0
"""What one process must know about the others: how many there are, sums over them, the norm of shared gradients."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from wedlm.train.deepspeed import uses_zero
from wedlm.train.optional_deps import require

_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator(bf16: bool, zero_stage: int = 0) -> Accelerator:
    """accelerate, as its launcher configured it. Raises ValueError for a kind of parallelism that the trainer does not
    support.

    accelerate silently continues without what it cannot do, and then every process would train alone, or keep whole
    weights, so that is an error here, too. ``zero_stage``: DeepSpeed's, on several GPUs whose launcher configured
    nothing of the kind.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        require("deepspeed", "accelerate's configuration")
    plugin = _zero_plugin(zero_stage)
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", deepspeed_plugin=plugin)
    kind = accelerator.distributed_type
    if kind not in _PLAIN and not accelerator.is_fsdp2 and not uses_zero(accelerator):
        raise ValueError(
            f"accelerate's configuration asks for {kind.value}; expected plain data parallelism, DeepSpeed, or FSDP "
            "with fsdp_version 2"
        )
    if kind in _PLAIN and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise ValueError("accelerate's configuration asks for DeepSpeed, which it only runs on GPUs; expected GPUs")
    if kind in _PLAIN and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError("accelerate's configuration asks for FSDP, which it only runs on GPUs; expected GPUs")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, of which accelerate sees {accelerator.num_processes}; expected as many "
            "GPUs, or ACCELERATE_USE_CPU=true in the environment"
        )
    if accelerator.is_fsdp2:
        _adjust_fsdp(accelerator.state.fsdp_plugin, bf16)
    return accelerator


def _zero_plugin(stage: int) -> DeepSpeedPlugin | None:
    """DeepSpeed's plugin; None if there is nothing to divide, or if accelerate's own configuration decides."""
    configured = any(os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true" for kind in ("DEEPSPEED", "FSDP"))
    several_gpus = int(os.environ.get("WORLD_SIZE", 1)) > 1 and torch.cuda.is_available()
    if not stage or configured or not several_gpus:
        return None
    require("deepspeed", "deepspeed_zero_stage")
    return DeepSpeedPlugin(zero_stage=stage)


def _adjust_fsdp(plugin: FullyShardedDataParallelPlugin, bf16: bool) -> None:
    # Every process reads the checkpoint itself, so sending it from the first saves nothing; and it unties weights.
    plugin.cpu_ram_efficient_loading = False
    if bf16:
        # accelerate's own policy would round the batch's loss coefficients and the losses to bfloat16, too.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def sum_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum in float64 on the host; all processes call it."""
    if accelerator.num_processes == 1:
        return values.cpu().double()
    return accelerator.reduce(values.to(accelerator.device).double(), "sum").cpu()


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients to at most ``max_norm`` and return the norm they had, over all processes."""
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)  # under DeepSpeed this tells what was done
    return norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm, device=accelerator.device)


def seed_forward(seed: int, step: int, accelerator: Accelerator) -> None:
    """Make dropout, the only randomness of a forward, a function of the step, so that a resumed run repeats it."""
    torch.manual_seed((seed << 32) + step * accelerator.num_processes + accelerator.process_index)
