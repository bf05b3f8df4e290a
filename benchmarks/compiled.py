# SPDX-License-Identifier: Apache-2.0
"""An experiment that the engine does not ship: a layer's halves around attention through torch.compile.

Inductor takes no weight that oneDNN has packed, so the compiled halves use plain weights; the graphs take weights as
arguments, so that all layers share them. `cpu_step.py --compile` measures it beside the engine.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from wedlm import LLM
from wedlm.model import load_model
from wedlm.model.rope import rotate


def _before(x: Tensor, norm: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple:
    dim = cos.shape[-1]
    rows = F.linear(F.rms_norm(x, norm.shape, norm, 1e-5), qkv).unflatten(-1, (-1, dim))
    turned = rotate(rows[:, : heads + kv_heads], cos, sin)
    return turned[:, :heads], turned[:, heads:], rows[:, heads + kv_heads :]


def _after(x: Tensor, attended: Tensor, out: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    x = x + F.linear(attended, out)
    gate, up = F.linear(F.rms_norm(x, norm.shape, norm, 1e-5), gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


def compiled_engine() -> LLM:
    """The demo model in bfloat16 with both halves of every layer compiled."""
    torch._dynamo.config.recompile_limit = 64
    llm = LLM("demo", dtype="bfloat16", device="cpu", max_model_len=1024)
    plain, config = load_model("demo", torch.bfloat16)
    before, after = torch.compile(_before), torch.compile(_after)
    for layer, source in zip(llm.model.model.layers, plain.model.layers, strict=True):
        attention, mlp = source.self_attn, source.mlp
        qkv = torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]).detach()
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
        norms = (source.input_layernorm.weight.detach(), source.post_attention_layernorm.weight.detach())
        outs = (attention.o_proj.weight.detach(), mlp.down_proj.weight.detach())

        def forward(x, cos, sin, attend, index, weights=(qkv, gate_up, norms, outs)) -> Tensor:
            qkv, gate_up, norms, outs = weights
            q, k, v = before(x, norms[0], qkv, cos, sin, config.num_heads, config.num_kv_heads)
            return after(x, attend(index, q, k, v).flatten(-2), outs[0], norms[1], gate_up, outs[1])

        layer.forward = forward
    return llm
