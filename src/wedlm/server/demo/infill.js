// SPDX-License-Identifier: Apache-2.0
// The page of gaps: two texts, and between them positions that are filled in an order of their own.

import { ServerError, complete, ownServer } from "./api.js";
import { NUM_COLOURS } from "./colours.js";
import { byId, complain, connected, hideBanner } from "./top.js";

const EXAMPLES = {
  "A sentence": ["The sun was setting over the", " as the boats came back to the harbour with the day's catch."],
  "A line of code": ["def mean(values):\n    total = 0\n    for value in values:\n       ", "\n    return total / len(values)\n"],
};
let model = "";
let running = null; // the AbortController of the gap that is being filled
let gap = null; // the latest one

/** What is known of the positions of one gap: their tokens, the forward that filled each, the one that made it final. */
class Gap {
  constructor(length) {
    this.cells = Array.from({ length }, () => ({ text: null, filled: Infinity, final: Infinity }));
    this.starts = []; // by forward: where its window began
    this.ends = []; // and ended
    this.closed = length; // the position of an end token; what stands behind it is no text
    this.final = 0;
  }

  accept(chunk) {
    const news = chunk.wedlm;
    if (news) {
      this._finish(news);
      this._fill(news);
    }
    if (chunk.choices?.[0]?.finish_reason === "stop") this.closed = this.final - 1;
  }

  get forwards() {
    return this.starts.length;
  }

  _finish({ step, tokens }) {
    for (const text of tokens) {
      const cell = this.cells[this.final++];
      if (cell.text === null) Object.assign(cell, { text, filled: step });
      cell.final = step;
    }
  }

  _fill({ step, window }) {
    const [start, texts] = window ? [window.start, window.tokens] : [this.final, []];
    this.starts[step] = start;
    this.ends[step] = window ? start + texts.length : this.final;
    texts.forEach((text, i) => {
      const cell = this.cells[start + i];
      if (text !== null && cell.text === null) Object.assign(cell, { text, filled: step });
    });
  }
}

byId("gap-form").addEventListener("input", showNumbers);
byId("gap-form").addEventListener("submit", (event) => {
  event.preventDefault();
  fill();
});
byId("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("key").addEventListener("change", connect);
byId("forward").addEventListener("input", () => draw(Number(byId("forward").value)));
byId("examples").addEventListener("click", (event) => {
  if (event.target.matches("button")) show(event.target);
});
show(byId("examples").querySelector("button"));
connect();

function show(button) {
  [byId("prefix").value, byId("suffix").value] = EXAMPLES[button.textContent];
  byId("length").value = button.dataset.length;
  showNumbers();
}

function showNumbers() {
  for (const output of document.querySelectorAll(".slider output")) output.value = byId(output.htmlFor.value).value;
}

async function connect() {
  model = await connected(byId("key").value.trim());
}

async function fill() {
  if (running) return;
  const number = (id) => Number(byId(id).value);
  const body = {
    model,
    prompt: byId("prefix").value,
    suffix: byId("suffix").value,
    max_tokens: number("length"),
    temperature: number("temperature"),
    decoding: "streaming",
    wedlm_window_size: number("window"),
    wedlm_entropy_threshold: number("threshold"),
    wedlm_trace: true,
  };
  hideBanner();
  if (!body.suffix) {
    complain(new ServerError("There is nothing after the gap; expected some text."));
    return;
  }
  running = new AbortController();
  setBusy(true);
  gap = new Gap(body.max_tokens);
  byId("note").hidden = true;
  byId("before").textContent = body.prompt;
  byId("after").textContent = body.suffix;
  draw(-1);
  try {
    for await (const chunk of complete(ownServer(byId("key").value.trim()), body, running.signal)) {
      if (chunk.warning) say(chunk.warning);
      gap.accept(chunk);
      draw(gap.forwards - 1);
    }
    const text = gap.cells.slice(0, gap.closed).map((cell) => cell.text);
    byId("announce").textContent = `The gap is filled in ${gap.forwards} forwards: ${text.join("")}`;
    if (gap.closed < gap.cells.length) say(`An end token at position ${gap.closed} closed the gap.`);
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
  }
  running = null;
  setBusy(false);
}

/** The text as forward `step` left it. */
function draw(step) {
  const slider = byId("forward");
  slider.max = Math.max(0, gap.forwards - 1);
  slider.value = Math.max(0, step);
  byId("inspect").hidden = gap.forwards === 0;
  byId("gap").replaceChildren(...gap.cells.map((cell, i) => drawn(cell, i, step)));
  const filled = gap.cells.filter((cell) => cell.filled === step).length;
  const final = gap.cells.filter((cell) => cell.final <= step).length;
  byId("forward-text").value = `${step}: filled ${filled}, final ${final} of ${gap.cells.length}`;
}

function drawn(cell, index, step) {
  const one = document.createElement("span");
  const ended = step === gap.forwards - 1 && index >= gap.closed;
  if (ended) {
    one.className = "cell closed";
  } else if (cell.filled > step) {
    const beyond = step >= 0 && index >= gap.ends[step];
    one.className = beyond ? "cell masked beyond" : "cell masked";
    one.title = beyond ? "masked, behind the window" : "masked";
    one.textContent = "·";
  } else {
    one.className = `cell ${cell.final > step ? "filled" : "final"} c${cell.filled % NUM_COLOURS}`;
    one.dataset.step = cell.filled;
    one.title = `filled by forward ${cell.filled}`;
    const number = document.createElement("sup");
    number.textContent = cell.filled;
    one.append(cell.text, number);
  }
  return one;
}

function say(sentence) {
  byId("note").textContent = sentence;
  byId("note").hidden = false;
}

function setBusy(busy) {
  byId("fill").hidden = busy;
  byId("stop").hidden = !busy;
  byId("filled").setAttribute("aria-busy", String(busy));
}
