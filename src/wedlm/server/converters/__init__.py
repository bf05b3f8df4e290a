# SPDX-License-Identifier: Apache-2.0
"""Other APIs, one per module: their requests become chats, and answers are written in their form."""
