# SPDX-License-Identifier: Apache-2.0
"""What loading a model can fail with."""


class CheckpointError(ValueError):
    """A checkpoint cannot be found, read or matched to its config; the message is one sentence for the user."""


class DemoModelError(RuntimeError):
    """The demo model could not be obtained; the message says what was tried and how to get it by hand."""
