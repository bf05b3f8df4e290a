# SPDX-License-Identifier: Apache-2.0
"""Prompts whose answers repeat most of them: 50 edits of code and 50 extractions, always the same ones.

An edit shows a Python program of two or three functions, made from templates and names from several trades, asks for
one change (five kinds, in turn) and wants the whole program back. An extraction shows records, as sentences, a log, a
table, an invoice or a page of contacts (in turn), and wants facts from them as JSON, as CSV or as a list.
"""

import random
from dataclasses import dataclass

COUNT = 50  # of each


@dataclass(frozen=True)
class _Trade:
    """The words of a program."""

    thing: str
    things: str
    number: str
    other: str
    place: str


_TRADES = (
    _Trade("order", "orders", "price", "discount", "shop"),
    _Trade("student", "students", "grade", "bonus", "school"),
    _Trade("parcel", "parcels", "weight", "padding", "depot"),
    _Trade("sensor", "sensors", "reading", "offset", "station"),
    _Trade("book", "books", "pages", "extra_pages", "library"),
    _Trade("player", "players", "score", "penalty", "team"),
    _Trade("invoice", "invoices", "amount", "tax", "company"),
    _Trade("ticket", "tickets", "duration", "delay", "counter"),
    _Trade("plant", "plants", "height", "growth", "garden"),
    _Trade("account", "accounts", "balance", "fee", "bank"),
)

_FUNCTIONS = (
    """def total_{number}({things}):
    result = 0
    for {thing} in {things}:
        result = result + {thing}["{number}"] - {thing}["{other}"]
    return result
""",
    """def find_{thing}({things}, name):
    for {thing} in {things}:
        if {thing}["name"] == name:
            return {thing}
    return None
""",
    """def largest_{number}({things}):
    largest = {things}[0]
    for {thing} in {things}:
        if {thing}["{number}"] > largest["{number}"]:
            largest = {thing}
    return largest
""",
    """def print_{things}({things}):
    for {thing} in {things}:
        print("{thing}:", {thing}["name"])
        print("{number}:", {thing}["{number}"])
        print("{other}:", {thing}["{other}"])
""",
    """def make_{thing}(name, {number}, {other}={default}):
    if {number} < 0:
        raise ValueError("{number} must not be negative")
    return {{"name": name, "{number}": {number}, "{other}": {other}}}
""",
    """def filter_{things}({things}, limit={default}):
    result = []
    for {thing} in {things}:
        if {thing}["{number}"] <= limit:
            result.append({thing})
    return result
""",
    """class {Thing}List:
    def __init__(self, {place}):
        self.{place} = {place}
        self.{things} = []

    def add(self, {thing}):
        self.{things}.append({thing})

    def count(self):
        return len(self.{things})
""",
)

_FIRST = ("Anna", "Boris", "Clara", "David", "Elena", "Farid", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Luis")
_LAST = ("Almeida", "Becker", "Costa", "Dubois", "Eriksen", "Fischer", "Garcia", "Hansen", "Ito", "Jansen", "Keller")
_CITIES = ("Lisbon", "Hamburg", "Porto", "Lyon", "Bergen", "Vienna", "Madrid", "Aarhus", "Osaka", "Utrecht", "Zurich")
_JOBS = ("nurse", "baker", "plumber", "teacher", "pilot", "carpenter", "librarian", "gardener", "designer", "driver")
_GOODS = (
    "desk lamp",
    "steel ruler",
    "paper tray",
    "wall clock",
    "garden hose",
    "tea kettle",
    "hand saw",
    "wool blanket",
)
_MONTHS = ("January", "March", "April", "June", "August", "October", "December")
_EVENTS = ("disk almost full", "connection refused", "user logged in", "backup finished", "password changed")


def edits() -> list[str]:
    """``COUNT`` requests for a change of code."""
    rng, found = random.Random("edits"), dict[str, None]()
    while len(found) < COUNT:
        found[_edit(rng, len(found))] = None
    return list(found)


def extractions() -> list[str]:
    """``COUNT`` requests for facts of a text."""
    rng = random.Random("extractions")
    kinds = (_people, _log, _table, _invoice, _contacts)
    return [kinds[number % len(kinds)](rng) for number in range(COUNT)]


def _edit(rng: random.Random, number: int) -> str:
    trade, default = rng.choice(_TRADES), rng.choice((5, 10, 20, 50, 100))
    words = {**vars(trade), "Thing": trade.thing.capitalize(), "default": default}
    chosen = rng.sample(_FUNCTIONS, rng.choice((2, 2, 3)))
    program = "\n\n".join(function.format(**words) for function in chosen)
    first = chosen[0].format(**words).split("(")[0].split(":")[0].removeprefix("def ").removeprefix("class ")
    asked = (
        f"Rename the variable `{trade.thing}` to `item` everywhere in this code.",
        f"Add a one-line docstring to `{first}` in this code. Change nothing else.",
        f'Replace the key "{trade.number}" by "value" in this code.',
        f"Rename `{first}` to `{'New' if first[0].isupper() else 'new_'}{first}` in this code. Keep all else as it is.",
        "Add the line `import logging` at the top of this code. Keep all else as it is.",
    )
    return f"{asked[number % len(asked)]} Write out the whole code.\n\n```python\n{program}```"


def _names(rng: random.Random, count: int) -> list[str]:
    return [f"{first} {last}" for first, last in zip(rng.sample(_FIRST, count), rng.sample(_LAST, count), strict=True)]


def _people(rng: random.Random) -> str:
    lines = [
        f"{name} from {rng.choice(_CITIES)} works as a {rng.choice(_JOBS)} and was born in {rng.randint(1950, 2004)}."
        for name in _names(rng, 5)
    ]
    return (
        'List all people in this text as a JSON array of objects with the keys "name", "job", "city" and "born".\n\n'
        + " ".join(lines)
    )


def _log(rng: random.Random) -> str:
    lines = [
        f"2024-0{rng.randint(1, 9)}-{rng.randint(10, 28)} {rng.choice(('INFO', 'WARNING', 'ERROR'))} "
        f"server{rng.randint(1, 4)}: {rng.choice(_EVENTS)}"
        for _ in range(10)
    ]
    level = rng.choice(lines).split()[1]
    return f"Copy all lines with {level} from this log, one after the other, as they are.\n\n" + "\n".join(lines)


def _table(rng: random.Random) -> str:
    rows = [
        f"| {name} | {rng.choice(_CITIES)} | {rng.randint(18, 70)} | {rng.choice(_JOBS)} |" for name in _names(rng, 6)
    ]
    table = "\n".join(["| name | city | age | job |", "| --- | --- | --- | --- |", *rows])
    return f"Write this table as CSV with a header line.\n\n{table}"


def _invoice(rng: random.Random) -> str:
    goods = rng.sample(_GOODS, 4)
    lines = [f"{rng.randint(1, 9)} x {good} at {rng.randint(3, 80)}.{rng.choice((0, 5, 9))}0 euros" for good in goods]
    day = f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} 2023"
    return (
        "Extract the customer, the date and all items (quantity, name and price) of this invoice as JSON.\n\n"
        f"Invoice no. {rng.randint(1000, 9999)}\nCustomer: {_names(rng, 1)[0]}, {rng.choice(_CITIES)}\nDate: {day}\n"
        + "\n".join(lines)
    )


def _contacts(rng: random.Random) -> str:
    lines = [
        f"You can reach {name} in our office in {rng.choice(_CITIES)} under "
        f"{name.split()[0].lower()}.{name.split()[1].lower()}@example.com or 0{rng.randint(200, 999)} "
        f"{rng.randint(100000, 999999)}."
        for name in _names(rng, 5)
    ]
    return "List every name in this text with its e-mail address and telephone number, one a line.\n\n" + " ".join(
        lines
    )
