# SPDX-License-Identifier: Apache-2.0
"""One page of Prometheus' text format from those of several replicas."""

import re
from collections.abc import Mapping

_HEAD = re.compile(r"# (?:HELP|TYPE) (\S+)")
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+.*)")


def per_replica(pages: Mapping[str, str]) -> str:
    """All samples of the pages, by replica, each with the label ``replica``; a family's samples stay together, as the
    format demands."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, page in sorted(pages.items()):
        family = ""
        for line in page.splitlines():
            head, sample = _HEAD.match(line), _SAMPLE.fullmatch(line)
            if head is not None:
                family = head[1]
                known = heads.setdefault(family, [])
                if line not in known:
                    known.append(line)
            elif sample is not None:
                name, labels, value = sample.groups()
                label = f'replica="{replica}"' + (f",{labels}" if labels else "")
                samples.setdefault(family or name, []).append(f"{name}{{{label}}} {value}")
    families = dict.fromkeys([*heads, *samples])
    return "".join(line + "\n" for name in families for line in [*heads.get(name, []), *samples.get(name, [])])
