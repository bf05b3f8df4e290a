# SPDX-License-Identifier: Apache-2.0
"""The prompts whose answers are in them: always the same, all different, and what is asked for is there."""

import ast
import re

from wedlm.bench.copying import COUNT, edits, extractions


def test_they_are_always_the_same_and_all_different():
    assert edits() == edits()
    assert extractions() == extractions()
    assert len({*edits(), *extractions()}) == 2 * COUNT == 100


def test_an_edit_shows_a_program_and_names_what_is_in_it():
    for prompt in edits():
        asked, program = re.fullmatch(r"(.*)\n\n```python\n(.*)```", prompt, re.DOTALL).groups()
        ast.parse(program)
        name = re.search(r'`([a-zA-Z_]+)`|key "([a-z_]+)"', asked)
        assert name is None or (name[1] or name[2]) in program


def test_an_extraction_has_what_it_asks_for():
    for prompt in extractions():
        level = re.match(r"Copy all lines with (\w+) from this log", prompt)
        if level:
            assert f" {level[1]} server" in prompt
        assert len(prompt.split("\n\n", 1)[1]) > 100
