# SPDX-License-Identifier: Apache-2.0
"""The model for transformers: after ``import wedlm.hf`` its Auto classes load WeDLM directories.

This is a thin shell: the network is that of ``wedlm.model``, and ``generate`` that of ``wedlm.engine``. Needs
transformers 5.
"""

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "wedlm.hf needs the package transformers; expected it installed: pip install 'wedlm[hf]'"
    ) from error
if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"transformers is {transformers.__version__}; wedlm.hf expects 5 or newer")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from wedlm.hf.configuration import WeDLMConfig
from wedlm.hf.masked_training import WeDLMCollator, masked_loss
from wedlm.hf.modeling import WeDLMForCausalLM

__all__ = ["WeDLMCollator", "WeDLMConfig", "WeDLMForCausalLM", "masked_loss"]
AutoConfig.register("wedlm", WeDLMConfig)
AutoModelForCausalLM.register(WeDLMConfig, WeDLMForCausalLM)
AutoTokenizer.register(WeDLMConfig, fast_tokenizer_class=PreTrainedTokenizerFast)
