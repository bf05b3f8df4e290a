# SPDX-License-Identifier: Apache-2.0
"""A trained adapter in four bits a number, as it is shipped, perhaps in a lower rank than it was trained in.

python pack_masked.py ADAPTER OUT [--rank N]
"""

import argparse
import json
from pathlib import Path

from wedlm.model.lora.packed_adapter import pack_adapter
from wedlm.model.lora.peft import CONFIG_FILE, WEIGHTS_FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, help="at most this one")
    given = parser.parse_args()
    size, lost = pack_adapter(given.adapter, given.out, WEIGHTS_FILE, given.rank)
    config = json.loads((given.adapter / CONFIG_FILE).read_text(encoding="utf-8"))
    if given.rank is not None and given.rank < config["r"]:
        config |= {"r": given.rank, "lora_alpha": config["lora_alpha"] / config["r"] * given.rank}
        (given.out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"bytes": size, "energy_lost": lost}))


if __name__ == "__main__":
    main()
