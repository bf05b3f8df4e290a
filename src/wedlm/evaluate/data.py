# SPDX-License-Identifier: Apache-2.0
"""Read questions from files in a local folder, in the forms that the task files use. Nothing is fetched here."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.samplers import ContextSampler

Document = dict[str, Any]

_CALCULATOR_MARK = re.compile(r"<<.*?>>")
_LETTERS = "ABCDEFGHIJ"


class Documents(list[Document]):
    """Questions of a task, in the form in which the harness reads a data set; ``shots`` are the examples to choose
    from.

    ``source`` is the name of the file that the examples come from.
    """

    def __init__(self, rows: Sequence[Document], shots: Sequence[Document] = (), source: str = "") -> None:
        super().__init__(rows)
        self.shots, self.source = list(shots), source

    @property
    def features(self) -> Document:
        """The names of the fields, as keys."""
        return dict.fromkeys(self[0])


def load(
    *,
    data_dir: str,
    chat: bool = False,
    test: str,
    form: str = "plain",
    shots: Sequence[str] = (),
    shots_subject: str = "",
    skip_shots: int = 0,
    **_: Any,
) -> dict[str, Documents]:
    """The split "test" from the file named ``test``. The harness calls this with a task's metadata and dataset_kwargs.

    ``form`` names how rows are read. ``shots``: files of examples, of which the first that exists is used, or the rows
    of ``test`` if none does. Of its examples those of ``shots_subject`` are taken, if one is named, without the first
    ``skip_shots``. Every document has the field ``chat``.
    """
    read = FORMS[form]
    rows = [{**read(row), "chat": chat} for row in read_rows(Path(data_dir), test)]
    for name in shots:
        if find_file(Path(data_dir), name) is not None:
            questions = {_question(row) for row in rows}
            examples = [{**read(row), "chat": chat} for row in read_rows(Path(data_dir), name)][skip_shots:]
            if shots_subject:
                examples = [row for row in examples if row.get("subject") == shots_subject]
            # A larger file may contain the questions themselves (MATH-500 and the test set it was drawn from).
            return {"test": Documents(rows, [row for row in examples if _question(row) not in questions], name)}
    return {"test": Documents(rows, rows, test)}


def find_file(directory: Path, name: str) -> Path | None:
    """The file of that name, of whatever kind, or None."""
    paths = [directory / f"{name}{kind}" for kind in (".jsonl.gz", ".jsonl", ".csv")]
    return next((path for path in paths if path.is_file()), None)


def read_rows(directory: Path, name: str) -> list[Document]:
    """Rows of a data file (.jsonl.gz, .jsonl or .csv). Raises ValueError if it is missing, empty or of another form."""
    path = find_file(directory, name)
    if path is None:
        raise ValueError(
            f"{directory} has no {name}.jsonl.gz; expected that file there (wedlm eval --download DIR fetches "
            "the public sets)"
        )
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        if path.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); expected one JSON object per line") from error
    if not rows:
        raise ValueError(f"{path} has no rows; expected at least one")
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} has a row that is not a JSON object; expected one per line, with named fields")
    return rows


def digest(documents: Sequence[Document]) -> str:
    """16 hexadecimal digits that change with the questions."""
    text = json.dumps(list(documents), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _question(row: Document) -> tuple[str, ...]:
    """What a row asks, and of which subject, because MMLU has the same words with other choices, and the same question
    in two subjects."""
    text = next((row[name] for name in ("question", "problem", "text", "prompt", "query") if name in row), row)
    return str(text), *(str(row[name]) for name in ("subject", "choices") if name in row)


def _plain(row: Document) -> Document:
    return row


def _lettered(row: Document) -> Document:
    """question, A, B, ..., answer (a letter)."""
    letters = [letter for letter in _LETTERS if row.get(letter) is not None]
    if row.get("answer") not in letters:
        raise ValueError(f"a row's answer is {row.get('answer')!r}; expected one of its letters, {''.join(letters)}")
    return {
        "question": row["question"].strip(),
        "subject": row.get("subject", "").replace("_", " "),
        "choices": [row[letter] for letter in letters],
        "letters": letters,
        "gold": letters.index(row["answer"]),
    }


def _gpqa(row: Document) -> Document:
    """A row with the official CSV's columns, with choices in an order that depends only on the question; or a lettered
    row."""
    if "Correct Answer" not in row:
        return _lettered(row)
    choices = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    order = sorted(range(4), key=lambda i: hashlib.sha256(f"{row['Question']}\n{i}".encode()).hexdigest())
    lettered = {letter: choices[i].strip() for letter, i in zip("ABCD", order, strict=True)}
    return _lettered({"question": row["Question"], **lettered, "answer": "ABCD"[order.index(0)]})


def _gpqa_explained(row: Document) -> Document:
    """A row with what an example needs: the explanation of its answer."""
    explanation = row.get("Explanation", row.get("explanation")) or ""
    return {**_gpqa(row), "explanation": explanation.strip()}


def _gsm8k(row: Document) -> Document:
    return {"question": row["question"], "answer": _CALCULATOR_MARK.sub("", row["answer"])}


def _mbpp(row: Document) -> Document:
    return {**row, "code": row["code"].replace("\r\n", "\n").strip(), "tests": "\n".join(row["test_list"])}


FORMS: dict[str, Callable[[Document], Document]] = {
    "plain": _plain,
    "lettered": _lettered,
    "gpqa": _gpqa,
    "gpqa_explained": _gpqa_explained,
    "gsm8k": _gsm8k,
    "mbpp": _mbpp,
}


def shots_of(documents: Documents) -> list[Document]:
    """The examples that belong to a task's questions."""
    return documents.shots


class FirstOthers(ContextSampler):
    """The first examples, the same for all questions so that their keys are shared. They come from the question's
    subject, if it has one, and never include the question itself."""

    def sample(self, n: int, eval_doc: Document | None = None, df: Any = None, **_: Any) -> list[Document]:
        subject = (eval_doc or {}).get("subject", "")
        others = (doc for doc in self.df if doc.get("subject", "") == subject and doc != eval_doc)
        return _first(others, n, f" of the subject {subject}" if subject else "")


class First(ContextSampler):
    """The first examples, of any subject, but never the question itself."""

    def sample(self, n: int, eval_doc: Document | None = None, df: Any = None, **_: Any) -> list[Document]:
        return _first((doc for doc in self.df if doc != eval_doc), n, "")


def _first(examples: Iterable[Document], n: int, of: str) -> list[Document]:
    found = list(itertools.islice(examples, n))
    if len(found) < n:
        raise ValueError(f"num_fewshot is {n}, but there are {len(found)} examples{of}; expected at most that many")
    return found
