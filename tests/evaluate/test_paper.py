# SPDX-License-Identifier: Apache-2.0
"""The paper's way of asking, and its tables."""

import pytest

from tests.engine.tiny_llm import save_tiny
from tests.evaluate.eval_data import write_rows
from wedlm.engine.llm import LLM
from wedlm.evaluate.code_tasks import mbpp_paper_program
from wedlm.evaluate.harness import EngineBackend
from wedlm.evaluate.paper_tables import PUBLISHED, SETS, Column, parse_model, tables
from wedlm.evaluate.provenance import model_provenance
from wedlm.evaluate.run import Evaluation, load_tasks
from wedlm.evaluate.scoring import chosen_letter, letter_results, marked_letter_results
from wedlm.evaluate.settings import Settings, make_params, protocol_tasks


def lettered(question, answer="B", **more):
    return {"question": question, "A": "one", "B": "two", "C": "three", "D": "four", "answer": answer, **more}


@pytest.fixture
def prompts(tmp_path):
    """The prompt and the reference of the last question of a set, by its name."""
    write_rows(tmp_path, "arc_c_test", [lettered(f"q{i}") for i in range(2)])
    for name in ("hellaswag_val", "hellaswag_train"):
        write_rows(tmp_path, name, [lettered(f"{name} {i}") for i in range(11)])
    subjects = ("law", "elementary_mathematics")
    for name in ("mmlu_dev", "mmlu_test"):
        write_rows(tmp_path, name, [lettered(f"{s} {name} {i}", subject=s) for s in subjects for i in range(6)])
    for name in ("gsm8k_test", "gsm8k_train"):
        write_rows(tmp_path, name, [{"question": f"{name} {i}?", "answer": f"<<1+1=2>>2\n#### {i}"} for i in range(4)])
    maths = {"problem": "p", "solution": "s \\boxed{1}", "answer": "1"}
    write_rows(tmp_path, "math500", [maths])
    write_rows(tmp_path, "math_train", [{**maths, "problem": f"train {i}"} for i in range(4)])
    write_rows(tmp_path, "gpqa_diamond", [lettered(f"g{i}", explanation=f"because {i}") for i in range(6)])
    code = {"code": "def f():\r\n    pass", "test_list": ["assert f() is None", "assert not f()"]}
    write_rows(tmp_path, "mbpp_prompt", [{**code, "text": f"prompt {i}.", "task_id": i} for i in range(1, 6)])
    write_rows(tmp_path, "mbpp_test", [{**code, "text": "test 11.", "task_id": 11}])

    def of(name):
        settings = Settings(protocol_tasks("paper", [name]), tmp_path, tmp_path / "out", protocol="paper")
        (task,) = load_tasks(settings, scores=False).values()
        documents = list(task.dataset["test"])
        context = task.fewshot_context(documents[-1], task.config.num_fewshot)
        return context, task.doc_to_target(documents[-1]), task.config.generation_kwargs

    return of


def test_a_letter_is_asked_for_with_the_options_in_the_prompt(prompts):
    context, target, options = prompts("arc_c")
    assert context == "Question: q1\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    assert target == "B"
    assert (options["max_gen_toks"], options["temperature"], options["window_size"]) == (4, 0.0, 4)
    context, target, options = prompts("hellaswag")
    assert context.count("Which option goes on best?\nB\n\n") == 10
    assert context.endswith(
        "hellaswag_train 9\nA) one\nB) two\nC) three\nD) four\nWhich option goes on best?\nB\n\n"
        "hellaswag_val 10\nA) one\nB) two\nC) three\nD) four\nWhich option goes on best?\n"
    )
    assert (target, options["max_gen_toks"]) == ("B", 4)


def test_mmlu_has_the_same_examples_of_elementary_mathematics_for_all(prompts):
    context, target, _ = prompts("mmlu")
    shots = [f"elementary_mathematics mmlu_dev {i}\nA. one\nB. two\nC. three\nD. four\nAnswer: B\n\n" for i in range(5)]
    head = "The following are multiple choice questions (with answers) about elementary mathematics.\n\n"
    last = "elementary_mathematics mmlu_test 5\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    assert context == head + "".join(shots) + last
    assert target == "B"


def test_chains_of_thought(prompts):
    context, target, _ = prompts("gpqa")
    assert context.startswith(
        "Question: g0\nA) one\nB) two\nC) three\nD) four\nAnswer:\nbecause 0\n#### B\n\nQuestion: g1"
    )
    assert context.endswith("because 4\n#### B\n\nQuestion: g5\nA) one\nB) two\nC) three\nD) four\nAnswer:\n")
    assert target == "because 5\n#### B"
    context, target, _ = prompts("gsm8k")
    assert context.endswith(
        "Question:\ngsm8k_train 2?\nAnswer:\n<<1+1=2>>2\n#### 2\n\nQuestion:\ngsm8k_test 3?\nAnswer:\n"
    )
    context, target, _ = prompts("math500")
    shot = "Problem:\ntrain 3\nSolution:\ns \\boxed{1}\nFinal Answer: The final answer is $1$. I hope it is correct."
    assert context.endswith(f"{shot}\n\nProblem:\np\nSolution:\n")


def test_mbpp_has_the_examples_two_to_four(prompts):
    context, target, options = prompts("mbpp")
    assert "prompt 1." not in context
    assert context.startswith("You are an expert Python programmer, and here is your task: prompt 2. Your code should")
    assert context.endswith(
        "test 11. Your code should pass these tests:\n\nassert f() is None\nassert not f()\n[BEGIN]\n"
    )
    assert target == "'def f():\n    pass'\n[DONE]"
    assert context.count("[DONE]") == 3
    assert options["until"] == ["[DONE]"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" B", "B"),
        ("C. three", "C"),
        ("(D)", "D"),
        ("**A**", "A"),
        ("d", None),
        ("The answer is C.", "C"),
        ("the right option: b", "B"),
        ("It must be D, surely", "D"),
        ("Because of that", None),
        ("Both", None),
        ("E", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer(text, letter):
    letters = ["A", "B", "C", "D"]
    assert chosen_letter(text, letters) == letter
    for gold in range(4):
        right = letter == letters[gold]
        assert letter_results({"letters": letters, "gold": gold}, [text]) == {"exact_match": float(right)}


def test_the_letter_after_the_mark():
    doc = {"letters": ["A", "B", "C", "D"], "gold": 2}
    assert marked_letter_results(doc, ["A or B?\n#### C"]) == {"exact_match": 1.0}
    assert marked_letter_results(doc, ["#### A, no:\n#### C"]) == {"exact_match": 1.0}
    assert marked_letter_results(doc, ["C\n#### B"]) == {"exact_match": 0.0}
    assert marked_letter_results(doc, ["the answer is C"]) == {"exact_match": 0.0}  # there a letter is drawn instead


def test_code_in_quotes():
    doc = {"test_list": ["assert f(1) == 2"]}
    for text in (
        "'def f(x):\n    return 2 * x' \n[DONE]\nmore",
        "def f(x):\n    return 2 * x",
        " 'def f(x): return 2 * x'",
    ):
        space: dict = {}
        exec(mbpp_paper_program(doc, text), space)


def test_a_run_asks_for_four_tokens_in_a_window_of_four(tmp_path):
    write_rows(tmp_path, "arc_c_test", [lettered(f"q{i}") for i in range(3)])
    directory = save_tiny(tmp_path / "model", max_position_embeddings=256)
    llm = LLM(directory, device="cpu", dtype="float32")
    asked = []
    generate_each = llm.generate_each
    llm.generate_each = lambda ids, params: asked.extend(params) or generate_each(ids, params)  # type: ignore
    settings = Settings(("arc_c_paper",), tmp_path, tmp_path / "out", protocol="paper")
    run = Evaluation(EngineBackend(llm, model_provenance(llm, str(directory), None)), settings, load_tasks(settings))
    record = run.run(make_params("paper", {}), {})
    assert [(one.max_tokens, one.wedlm_window_size, one.temperature, one.decoding) for one in asked] == [
        (4, 4, 0.0, "streaming")
    ] * 3
    assert record["tasks"]["arc_c_paper"]["kind"] == "generate"
    assert record["tasks"]["arc_c_paper"]["metric"] == "exact_match"
    run.run(make_params("paper", {"decoding": "autoregressive", "seed": 1}), {})
    assert {one.wedlm_window_size for one in asked[3:]} == {6}


def test_published_averages_are_those_of_the_published_scores():
    """A slip of a digit would show."""
    for models in PUBLISHED.values():
        for name, (*scores, average) in models.items():
            assert len(scores) == len(SETS) == 10
            assert sum(scores) / 10 == pytest.approx(average, abs=0.0151), name


def test_tables():
    record = {
        "params": {"decoding": "streaming"},
        "tasks": {f"{name}_paper": {"value": 0.5, "num_samples": 1000} for name in SETS},
    }
    whole = Column.of("mine", "instruct", record)
    part = Column("some", "instruct", "autoregressive", {"arc_c": 25.0}, {"arc_c": 40})
    text = tables([whole, part])
    base, instruct = text.split("## Table 2")
    assert "here" not in base
    assert "| **mine, here (streaming)** | **some, here (autoregressive)** |" in instruct
    assert "| 92.92 | 50.00 (1,000) | 25.00 (40) |" in instruct
    assert "| 80.49 | 50.00 (1,000) | – |" in instruct
    assert "| 77.53 | 50.00 | – |" in instruct


def test_kinds_of_models():
    assert parse_model("tencent/WeDLM-8B-Instruct") == ("tencent/WeDLM-8B-Instruct", "instruct")
    assert parse_model("demo") == ("demo", "instruct")
    assert parse_model("dir/x") == ("dir/x", "base")
    assert parse_model("a=b=instruct") == ("a=b", "instruct")
    with pytest.raises(ValueError, match="--models has 'x=chat'; expected NAME, NAME=base or NAME=instruct"):
        parse_model("x=chat")
