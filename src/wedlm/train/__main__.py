# SPDX-License-Identifier: Apache-2.0
"""``accelerate launch -m wedlm.train config.yaml --key value`` does the same as ``wedlm train``."""

import sys

from wedlm.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
