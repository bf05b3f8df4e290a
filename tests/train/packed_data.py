# SPDX-License-Identifier: Apache-2.0
"""Packed sequences of small files, and digests of them."""

import numpy as np

from tests.train.chat_data import chat_tokenizer
from wedlm.train.data import PackedData

TOKENIZER = chat_tokenizer()
END = TOKENIZER.token_id("<|im_end|>")
LENGTH = 48


def packed(cache, repeats=(1, 1), seed=5, **options) -> PackedData:
    return PackedData(cache, repeats, LENGTH, seed, pad_token_id=END, **options)


def digest(data, indices) -> list[list[int]]:
    return [[int(data.sequence(i).tokens @ np.arange(LENGTH)), *data.sequence(i).documents.tolist()] for i in indices]
