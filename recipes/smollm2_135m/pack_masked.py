# SPDX-License-Identifier: Apache-2.0
"""A trained adapter in four bits a number, as it is shipped. ``python pack_masked.py ADAPTER OUT``"""

import json
import sys
from pathlib import Path

from wedlm.model.lora.packed_adapter import pack_adapter
from wedlm.model.lora.peft import WEIGHTS_FILE

if __name__ == "__main__":
    size, lost = pack_adapter(*map(Path, sys.argv[1:3]), WEIGHTS_FILE)
    print(json.dumps({"bytes": size, "energy_lost": lost}))
