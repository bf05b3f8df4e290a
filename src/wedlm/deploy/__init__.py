# SPDX-License-Identifier: Apache-2.0
"""More than one copy of a model: batch work and serving on Ray."""
