# SPDX-License-Identifier: Apache-2.0
"""Make a WeDLM directory for training from an AR checkpoint by adding a mask token and a block size."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wedlm.model.config import WEDLM_MASK_TOKEN_ID, ModelConfig, check_integer
from wedlm.model.formats.checkpoint import INDEX_FILE, WEIGHTS_FILE, load_model, save_model
from wedlm.model.formats.resolve import locate
from wedlm.model.formats.tokenizer import Tokenizer, load_tokenizer
from wedlm.model.transformer import Transformer

DEFAULT_BLOCK_SIZE = 32
# What may stand beside the weights and is taken over as it is, so that every reader finds the original's settings.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
# Names that Qwen tokenizers give to the two ids before the ones they differ in.
_QWEN_TOKENS = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
# Conversations that between them make a chat template write all that it writes without tools.
_PROBES = (("user",), ("system", "user", "assistant", "user"), ("user", "assistant", "tool"))
_RESERVED_WORDS = ("reserved", "unused")


@dataclass(frozen=True, slots=True)
class InitResult:
    """A new WeDLM directory. ``mask_token`` is the text of the mask token's id, or None if it has none."""

    directory: Path
    config: ModelConfig
    mask_token: str | None


def init_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    mask_token_id: int | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
    force: bool = False,
) -> InitResult:
    """Write a WeDLM directory to ``output``, with the weights, tokenizer and model type of the AR model ``source``.

    ``source``: a Hugging Face directory, a hub id, a ``.gguf`` file or "demo-base". ``mask_token_id`` None chooses one
    (``choose_mask_token_id``); its embedding becomes the mean of the vocabulary's. ``block_size``: B of training, in
    tokens. ``force`` allows a directory that is not empty, in which it replaces a checkpoint's files and no others.
    ``output`` decodes in AR like ``source``. Raises ValueError, with nothing written.
    """
    check_integer("block_size", block_size, minimum=1)
    output, origin = Path(output).expanduser(), locate(source)
    check_output(output, origin, force)
    tokenizer = load_tokenizer(source)
    model, config = load_model(source)
    if config.sees_by_block:
        raise ValueError(f"{source} has model_type {config.model_type!r}; expected an AR checkpoint, which is causal")
    if config.is_wedlm:
        raise ValueError(f"{source} is a WeDLM checkpoint already; expected an AR checkpoint")
    asked = config.mask_token_id if mask_token_id is None else mask_token_id
    if asked is None:
        asked = choose_mask_token_id(config, tokenizer)
    check_mask_token_id(asked, config, tokenizer)
    config = dataclasses.replace(config, mask_token_id=asked, block_size=block_size)
    set_mask_embedding(model, asked, min(tokenizer.vocab_size, config.vocab_size))
    _write(model, config, tokenizer, origin, output)
    return InitResult(output, config, tokenizer.backend.id_to_token(asked))


def choose_mask_token_id(config: ModelConfig, tokenizer: Tokenizer) -> int:
    """The id that stands for masked positions: one that no text and no chat ever needs. The first rule that gives one:

    1. Qwen's vocabularies: 151665, as in the published WeDLM checkpoints.
    2. Special tokens that ``check_mask_token_id`` admits: the last that calls itself reserved or unused, else the last
       (16, <empty_output>, for SmolLM2).
    3. The first id behind the tokenizer's, where the embedding is padded.

    Raises ValueError if there is none.
    """
    if _is_qwen(tokenizer) and config.vocab_size > WEDLM_MASK_TOKEN_ID:
        return WEDLM_MASK_TOKEN_ID
    written = _written_ids(tokenizer)
    ids = [token_id for token_id in sorted(tokenizer.special_ids) if token_id < config.vocab_size]
    special = [token_id for token_id in ids if _use(token_id, config, tokenizer, written) is None]
    texts = {token_id: tokenizer.backend.id_to_token(token_id) or "" for token_id in special}
    reserved = [token_id for token_id in special if any(word in texts[token_id] for word in _RESERVED_WORDS)]
    if special:
        return (reserved or special)[-1]
    if tokenizer.vocab_size < config.vocab_size:
        return tokenizer.vocab_size
    raise ValueError(
        f"the tokenizer uses all {config.vocab_size} ids and every special token; expected a model with a padded "
        "embedding or a special token to spare"
    )


def check_mask_token_id(token_id: int, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError if ``token_id`` has no embedding, or if text, a chat or the end of a text needs it."""
    check_integer("mask_token_id", token_id, minimum=0)
    if token_id >= config.vocab_size:
        raise ValueError(f"mask_token_id is {token_id}; expected an id from 0 to {config.vocab_size - 1}")
    use = _use(token_id, config, tokenizer, _written_ids(tokenizer))
    if use is not None:
        raise ValueError(f"mask_token_id is {token_id}, which is {use}; expected an id that text never needs")


def _use(token_id: int, config: ModelConfig, tokenizer: Tokenizer, written: frozenset[int]) -> str | None:
    """What a token is used for; None if it is not used. ``written`` is the result of ``_written_ids``."""
    text = tokenizer.backend.id_to_token(token_id)
    if token_id in config.eos_token_ids:
        return f"the end token {text!r}"
    if token_id == config.bos_token_id:
        return f"the first token of a text, {text!r}"
    if text is None or (token_id == WEDLM_MASK_TOKEN_ID and _is_qwen(tokenizer)):
        return None  # Qwen3 calls it <tool_response>; a mask is a flag of a position, so prompts may still contain it.
    for name, named in tokenizer.special_tokens.items():
        if named == text:
            return f"the tokenizer's {name} {text!r}"
    if token_id not in tokenizer.special_ids:
        return f"the token {text!r} of ordinary text"
    if token_id in written or any(text in template for template in tokenizer.chat_templates.values()):
        return f"the token {text!r} of the chat template, or one that the tokenizer adds to every text"
    return None


def _written_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that the tokenizer adds to a text, and those of rendered chats: a template may join a token from pieces."""
    ids = set(tokenizer.encode(""))
    for text in tokenizer.probe_chats([{"role": role, "content": "x"} for role in roles] for roles in _PROBES):
        ids.update(tokenizer.encode(text, add_special_tokens=False))
    return frozenset(ids)


def _is_qwen(tokenizer: Tokenizer) -> bool:
    return all(tokenizer.token_id(text) == token_id for text, token_id in _QWEN_TOKENS.items())


@torch.no_grad()
def set_mask_embedding(model: Transformer, mask_token_id: int, num_tokens: int) -> None:
    """Set the mask token's row to the mean of the other rows below ``num_tokens``, in place, and also in the output
    projection if that has separate weights."""
    weights: list[Tensor] = [model.model.embed_tokens.weight]
    if not model.config.tie_word_embeddings:
        weights.append(model.lm_head.get_parameter("weight"))
    for weight in weights:
        weight[mask_token_id] = mean_of_others(weight, mask_token_id, num_tokens)


def mean_of_others(weight: Tensor, token_id: int, num_tokens: int) -> Tensor:
    """Mean [C], float32, of the rows of ``weight`` [V, C] below ``num_tokens`` but for ``token_id``'s."""
    others = torch.arange(num_tokens, device=weight.device) != token_id
    # Summed in float32 without a float32 copy of the whole matrix.
    total = torch.sum(weight[:num_tokens] * others[:, None].to(weight.dtype), dim=0, dtype=torch.float32)
    return total / others.sum()


def check_output(output: Path, origin: Path, force: bool) -> None:
    """Raises ValueError unless a checkpoint made from ``origin`` may be written to the directory ``output``."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; expected a directory to write to")
    if output.is_dir() and origin.is_dir() and output.samefile(origin):
        raise ValueError(f"{output} is the source itself; expected another directory to write to")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise ValueError(f"{output} is not empty; expected a new directory, or --force (force=True)")


def _write(model: Transformer, config: ModelConfig, tokenizer: Tokenizer, origin: Path, output: Path) -> None:
    """Write the config last, because a directory that has one is complete."""
    remove_checkpoint(output)
    copy_companions(origin, tokenizer, output)
    save_model(model, config, output)


def remove_checkpoint(output: Path) -> None:
    """Delete the files of an earlier checkpoint in ``output``, since its shards would remain next to the one file that
    replaces them. Creates the directory if it is missing."""
    output.mkdir(parents=True, exist_ok=True)
    weights = [*output.glob("model-*-of-*.safetensors"), output / WEIGHTS_FILE]
    for old in [output / name for name in ("config.json", INDEX_FILE, *_COMPANIONS)] + weights:
        old.unlink(missing_ok=True)


def copy_companions(origin: Path, tokenizer: Tokenizer, output: Path) -> None:
    """Copy the files that come with a checkpoint's weights; for a GGUF file, write its tokenizer."""
    if not origin.is_dir():
        tokenizer.save(output)
        return
    for name in _COMPANIONS:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, output / name)
