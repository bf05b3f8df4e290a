# SPDX-License-Identifier: Apache-2.0
"""``python -m wedlm`` runs the command ``wedlm`` if scripts are not on the path."""

from wedlm.cli import main

if __name__ == "__main__":
    main()
