# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's ZeRO-1 and ZeRO-2 through accelerate: moments (and gradients) are divided among the GPUs, weights are
not.

The engine reduces, clips and steps by itself, inside ``backward``. It computes as one device does (float32 weights,
autocast), and checkpoints are the trainer's own files: moments are gathered parameter by parameter.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


def uses_zero(accelerator: Accelerator) -> bool:
    """Whether accelerate was configured to run DeepSpeed."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def is_engine(model: nn.Module) -> bool:
    """Whether this is DeepSpeed's engine around a model."""
    return type(model).__module__.startswith("deepspeed.")


def configure(accelerator: Accelerator, bf16: bool, sequences: int, max_grad_norm: float) -> None:
    """Set what accelerate's file leaves open or would decide differently; ``sequences`` of a forward on one device.

    Raises ValueError for what the trainer does not support.
    """
    plugin = accelerator.state.deepspeed_plugin
    config: dict[str, Any] = plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2):
        raise ValueError(
            f"accelerate's configuration asks for ZeRO stage {zero.get('stage')}; expected 1 or 2, or FSDP with "
            "fsdp_version 2, which shards weights, too"
        )
    for key in ("offload_optimizer", "offload_param"):
        device = (zero.get(key) or {}).get("device", "none")
        if device != "none":
            raise ValueError(f"accelerate's configuration has {key} to {device}; expected none")
    config.pop("fp16", None)
    config.update(
        train_micro_batch_size_per_gpu=sequences,
        gradient_accumulation_steps=1,  # the trainer says which micro-batch is the last
        gradient_clipping=max_grad_norm,
        bf16={"enabled": False},  # weights would be bfloat16
        torch_autocast={"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    )


def backward(accelerator: Accelerator, loss: Tensor, last: bool) -> None:
    """Add up the micro-batch's gradients; with the ``last`` one of a step also reduce, clip, step and clear them."""
    accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=last)


def moments(engine: Any) -> dict[str, dict[str, Tensor]]:
    """AdamW's state by the parameter's name, whole, on the CPU. All processes call it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _find_state(engine)
    step = next(iter(_adamw(engine).state.values()))["step"]
    return {
        name: {
            "step": torch.as_tensor(step).detach().cpu().clone(),
            **{key: safe_get_full_optimizer_state(parameter, key).cpu() for key in _MOMENTS},
        }
        for name, parameter in _trained(engine)
    }


def restore(engine: Any, state: dict[str, dict[str, Tensor]]) -> None:
    """Adopt the weights that the wrapped model now has, and AdamW's ``state``. Call ``make_state`` before."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    for name, parameter in _trained(engine):
        safe_set_full_fp32_param(parameter, parameter.detach().float().clone())
        for key in _MOMENTS:
            safe_set_full_optimizer_state(parameter, state[name][key].to(parameter.device), key)
    step = next(iter(state.values()))["step"]
    for values in _adamw(engine).state.values():
        values["step"] = step.to(values["step"], copy=True) if isinstance(values["step"], Tensor) else int(step)


def make_state(engine: Any) -> None:
    """Create AdamW's state, which does not exist before its first step, by a step of size 0 without gradients. It
    writes the weights that the engine began with."""
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(sum((parameter * 0).sum() for _, parameter in _trained(engine)))
    engine.step()
    _find_state(engine)


def _find_state(engine: Any) -> None:
    """Find the moments of all groups. DeepSpeed (0.19.8) looks for them after the step of the first group, and then
    never again."""
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def _trained(engine: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def _adamw(engine: Any) -> torch.optim.Optimizer:
    adamw: torch.optim.Optimizer = engine.optimizer.optimizer  # inside ZeRO's own
    return adamw
