# SPDX-License-Identifier: Apache-2.0
"""Stage 5: write the report as Markdown and as one self-contained HTML page, with the lines that use the adapter."""

import base64
import html
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from wedlm import __version__
from wedlm.accelerate.measure import BASE_MODES, SPEED_MODES, same_texts
from wedlm.accelerate.settings import ADAPTER, Settings
from wedlm.machine import cpu_name, usable_cores
from wedlm.model.formats.save import write_whole
from wedlm.plotting import Plot, finish_plot, new_figure, place_legend
from wedlm.train.metrics import METRICS_FILE, read_metrics

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """What a report is made of. ``state`` has what ``run.json`` says of each stage, ``parts`` what was measured."""

    settings: Settings
    state: Mapping[str, Values]
    parts: Mapping[str, Values]
    machine: str
    mask_token_id: int


@dataclass(frozen=True)
class Block:
    """A part of the report: a heading, a paragraph, code, a table (whose first row is its head) or a figure."""

    kind: str
    text: str = ""
    rows: tuple[tuple[str, ...], ...] = ()
    plot: Plot | None = None
    file: str = ""


def machine_name(device: torch.device) -> str:
    """The GPU's name, or the processor's name and its number of cores."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {usable_cores()} cores"


def write_report(facts: Facts) -> Path:
    """Write ``report.md``, ``report.html`` and the figures to the output directory. Returns the page's path."""
    output = facts.settings.output
    blocks = _blocks(facts)
    (output / "figures").mkdir(exist_ok=True)
    for block in blocks:
        if block.plot is not None:
            (output / block.file).write_text(block.plot.svg, encoding="utf-8")
    title = f"{facts.settings.model}, accelerated"
    for name, text in (("report.md", _markdown(title, blocks)), ("report.html", _html(title, blocks))):
        with write_whole(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")
    return output / "report.html"


def usage(settings: Settings) -> tuple[str, str]:
    """The lines of Python and the command line that use the result."""
    adapter = str(settings.output / ADAPTER)
    python = f"from wedlm import LLM\n\nllm = LLM({json.dumps(settings.model)}, adapter={json.dumps(adapter)})"
    return python, f"wedlm serve {shlex.join(['--model', settings.model, '--adapter', adapter])}"


def summary(facts: Facts) -> str:
    """The gain in one sentence."""
    parts = facts.parts
    before, after = (parts[when]["tokens_per_forward"] for when in ("before", "after"))
    same, total = same_texts(parts, "after"), len(parts["base_ar"]["token_ids"])
    rates = parts["speed"]["tok_per_s"]
    best = max(SPEED_MODES[1:], key=lambda mode: rates[mode])
    alone = parts["base_speed"]["tok_per_s"]
    return (
        f"{after:.2f} tokens a forward on {total} held-out prompts ({before:.2f} before), {same} of {total} texts "
        f"equal to the base's; one stream: {rates[best]:.3g} tok/s ({best}) against {rates['autoregressive']:.3g} "
        f"(AR); the base by itself: {alone['auto']:.3g} (auto), {alone['autoregressive']:.3g} (AR)"
    )


def _blocks(facts: Facts) -> list[Block]:
    python, shell = usage(facts.settings)
    acceptance, training = _acceptance_plot(facts), _training_plot(facts.settings.output)
    return [
        Block("text", f"{summary(facts)}."),
        Block("code", python, file="python"),
        Block("code", shell, file="sh"),
        Block("heading", "Held-out prompts"),
        Block("table", rows=_text_rows(facts)),
        Block("text", _about_texts(facts)),
        Block("heading", "Tokens a second, one stream"),
        Block("table", rows=_speed_rows(facts)),
        Block("text", _about_speed(facts)),
        Block("heading", "Acceptance by depth"),
        Block("table", rows=_depth_rows(facts)),
        Block("figure", plot=acceptance, file="figures/acceptance.svg"),
        Block("heading", "Training"),
        Block("text", _about_training(facts)),
        *([] if training is None else [Block("figure", plot=training, file="figures/training.svg")]),
        Block("text", _about_data(facts)),
        Block("table", rows=_time_rows(facts)),
        Block("text", _about_machine(facts)),
    ]


def _text_rows(facts: Facts) -> tuple[tuple[str, ...], ...]:
    total = len(facts.parts["base_ar"]["token_ids"])
    names = {
        "base_ar": "base, AR",
        "before": "base, verified (before)",
        "after_ar": "adapter, AR",
        "after": "adapter, verified (after)",
    }
    rows = [
        (
            words,
            f"{part['tokens_per_forward']:.2f}",
            f"{part['p_cache']:.3f}",
            f"{same_texts(facts.parts, name)} of {total}",
            str(total - sum(part["ended"])),
            _tokens_of_ended(part),
        )
        for name, words in names.items()
        for part in [facts.parts[name]]
    ]
    return (
        ("", "tokens a forward", "p_cache", "the base's AR text", "answers cut", "the others: tokens a forward"),
        *rows,
    )


def _tokens_of_ended(part: Values) -> str:
    """Tokens per forward of the answers that ended within the limit."""
    ended = [
        (len(ids), n) for ids, n, end in zip(part["token_ids"], part["forwards"], part["ended"], strict=True) if end
    ]
    return f"{sum(tokens for tokens, _ in ended) / sum(n for _, n in ended):.2f}" if ended else "none"


def _about_texts(facts: Facts) -> str:
    settings = facts.settings
    return (
        f"Temperature 0, at most {settings.max_tokens} tokens an answer and {settings.rows} rows a step. p_cache is "
        "tokens per row run: rows cost time, so tokens a forward are no speed-up by themselves. "
        f"Engine of the base: {facts.parts['base_ar']['engine']}. "
        f"Engine with the adapter: {facts.parts['after_ar']['engine']}."
    )


def _speed_rows(facts: Facts) -> tuple[tuple[str, ...], ...]:
    found = facts.parts["speed"]
    ar = found["tok_per_s"]["autoregressive"]
    rows = [_speed_row(mode, found, mode, ar) for mode in found["tok_per_s"]]
    rows += [_speed_row(f"the base by itself, {mode}", facts.parts["base_speed"], mode, ar) for mode in BASE_MODES]
    return (("", "tok/s", "rounds", "against AR", "tokens a forward"), *rows)


def _speed_row(name: str, found: Values, mode: str, ar: float) -> tuple[str, ...]:
    rate, rounds = found["tok_per_s"][mode], found["rounds"][mode]
    spread = f"{min(rounds):.3g} to {max(rounds):.3g}"
    return name, f"{rate:.3g}", spread, f"{rate / ar:.2f}x", f"{found['tokens_per_forward'][mode]:.2f}"


def _about_speed(facts: Facts) -> str:
    found = facts.parts["speed"]
    text = (
        f"Medians of {len(found['rounds']['auto'])} rounds over {found['prompts']} of the held-out prompts, modes "
        "taking turns, on the engine with the adapter."
    )
    return (
        f"{text} The base by itself is on the engine that it gets without an adapter, where auto drafts from the text "
        f"alone: {facts.parts['base_speed']['engine']}."
    )


def _depth_rows(facts: Facts) -> tuple[tuple[str, ...], ...]:
    before, after = (facts.parts[when] for when in ("before", "after"))
    depth = max(len(before["shares"]), len(after["shares"]))

    def cell(part: Values, index: int) -> str:
        return f"{part['shares'][index]:.3f}" if index < len(part["shares"]) else "not reached"

    rows = [
        (str(index + 1), cell(before, index), cell(after, index), str(after["trials"][index])) for index in range(depth)
    ]
    return (("draft", "accepted before", "accepted after", "drafts after"), *rows)


def _acceptance_plot(facts: Facts) -> Plot:
    figure, (axes,) = new_figure(1)
    for when in ("before", "after"):
        shares = facts.parts[when]["shares"]
        axes.plot(range(1, len(shares) + 1), shares, ".-", label=when)
    axes.set_xlabel("draft, by its distance from the text")
    axes.set_ylabel("share accepted")
    axes.set_ylim(0, 1)
    place_legend(figure, axes)
    return finish_plot(
        figure, "Acceptance by depth", "Share of drafts that verification accepts, before and after training"
    )


def _training_plot(output: Path) -> Plot | None:
    """The training curves, or None if the run logged no figures."""
    path = output / "training" / METRICS_FILE
    records = [one for one in read_metrics(path) if "masked_loss" in one] if path.is_file() else []
    if not records:
        return None
    figure, panels = new_figure(2)
    for axes, name, label in zip(
        panels, ("masked_loss", "masked_accuracy"), ("masked loss (nats)", "masked rows guessed right"), strict=True
    ):
        axes.plot([one["step"] for one in records], [one[name] for one in records], ".-" if len(records) < 2 else "-")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
    return finish_plot(figure, "Training", "Loss and accuracy of masked rows over the steps of training")


def _about_data(facts: Facts) -> str:
    settings = facts.settings
    prompts, answers = (facts.state[stage]["result"] for stage in ("prompts", "answers"))
    given = [str(path) for path in (*settings.prompts, *settings.data)]
    source = (
        ", ".join(given) if given else "the default mixture, templates written for this package, no real users' prompts"
    )
    overlap = "; their topics are not among those trained on, their templates are" if not given else ""
    return (
        f"Prompts: {source}. {prompts['training']:,} to train on, {prompts['held_out']} held out{overlap}; "
        f"{prompts['too_long']} longer than {settings.max_prompt_tokens} tokens. Of the model's own greedy answers "
        f"{answers['written']:,} were trained on ({answers['tokens']:,} tokens), {answers['cut']} of which did not end "
        f"within {settings.max_tokens} tokens; {answers['unusable']} empty ones were not."
    )


def _about_training(facts: Facts) -> str:
    config = yaml.safe_load((facts.settings.output / "training.yaml").read_text(encoding="utf-8"))
    path = facts.settings.output / "training" / METRICS_FILE
    steps = max((one["step"] for one in read_metrics(path)), default=0) if path.is_file() else 0
    size = sum(file.stat().st_size for file in (facts.settings.output / ADAPTER).glob("*.safetensors")) / 1e6
    return (
        f"A LoRA of rank {config['lora_rank']} for masked rows ({', '.join(config['lora_targets'])}), blocks of "
        f"{config['block_size']} positions, {steps:,} steps, peak rate {config['learning_rate']:g}: {size:,.1f} MB."
    )


def _time_rows(facts: Facts) -> tuple[tuple[str, ...], ...]:
    rows = [(stage, _duration(made["seconds"])) for stage, made in facts.state.items()]
    return (("stage", "time"), *rows)


def _about_machine(facts: Facts) -> str:
    return (
        f"{facts.machine}; wedlm {__version__}, torch {torch.__version__}; mask token {facts.mask_token_id}. All "
        "settings of the training are in training.yaml, what was measured in measurement/parts.json. The folders "
        "training and answers are no longer needed."
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _markdown(title: str, blocks: Sequence[Block]) -> str:
    lines = [f"# {title}", ""]
    for block in blocks:
        if block.kind == "heading":
            lines.append(f"## {block.text}")
        elif block.kind == "code":
            lines += [f"```{block.file}", block.text, "```"]
        elif block.kind == "table":
            head, *rows = block.rows
            lines += [_row(head), _row(["---"] * len(head)), *map(_row, rows)]
        elif block.plot is not None:
            lines.append(f"![{block.plot.text}]({block.file})")
        else:
            lines.append(block.text)
        lines.append("")
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
pre { background: #8882; padding: .6rem; border-radius: 4px; overflow-x: auto; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
"""


def _html(title: str, blocks: Sequence[Block]) -> str:
    """One page without scripts, in which everything that a user or a model named is escaped."""
    escape = html.escape
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    body = [f"<h1>{escape(title)}</h1>"]
    for block in blocks:
        if block.kind == "heading":
            body.append(f"<h2>{escape(block.text)}</h2>")
        elif block.kind == "code":
            body.append(f"<pre>{escape(block.text)}</pre>")
        elif block.kind == "table":
            marks = ["th", *["td"] * (len(block.rows) - 1)]
            rows = (
                "<tr>" + "".join(f"<{mark}>{escape(cell)}</{mark}>" for cell in row) + "</tr>"
                for mark, row in zip(marks, block.rows, strict=True)
            )
            body.append("<table>\n" + "\n".join(rows) + "\n</table>")
        elif block.plot is not None:
            image = base64.b64encode(block.plot.svg.encode()).decode()
            body.append(f'<img alt="{escape(block.plot.text)}" src="data:image/svg+xml;base64,{image}">')
        else:
            body.append(f"<p>{escape(block.text)}</p>")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )
