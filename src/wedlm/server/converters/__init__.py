# SPDX-License-Identifier: Apache-2.0
"""Other APIs, each a module: its requests become chats, and the answers are written in its words."""
