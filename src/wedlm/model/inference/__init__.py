# SPDX-License-Identifier: Apache-2.0
"""The forms in which a model runs in the engine: packed layers, the Triton forward, integers."""
