// SPDX-License-Identifier: Apache-2.0
// One side of a race: the answer's text, coloured by forward, its progress bar and its figures.

import { NUM_COLOURS } from "./colours.js";
import { copyButton } from "./copy.js";
import { format, mark } from "./markdown.js";

const RESTS = 8; // formatting may take one part of so many of the time

/** Other servers do not tell which forward made a token final: there a chunk takes a forward's place. */
export class Answer {
  constructor(name, maxTokens, formatted) {
    const parts = document.getElementById("lane-template").content.cloneNode(true);
    this.lap = parts.querySelector(".lap");
    this.element = parts.querySelector(".answer");
    this.name = name;
    this.maxTokens = maxTokens;
    this.text = "";
    this.pieces = []; // {text, step, title, colour}: the text as it is shown
    this.tokens = 0;
    this.first = 0; // how many of them came first, together, at the time `began`; the latest came at `last`
    this.forwards = null;
    this.groups = 0; // forwards that made tokens final; the colours follow them, so that neighbours differ
    this.usage = null;
    this.state = "waiting"; // then running, and at last done, stopped or failed
    this._formatted = formatted;
    this._drawn = 0; // pieces that are shown
    this._plain = 0; // those of them that are shown as they were written
    this._rest = 0; // no formatting before this time
    this._shown = this.element.querySelector(".text");
    this._bar = this.lap.querySelector("i");
    for (const one of [...this.lap.querySelectorAll(".name"), ...this.element.querySelectorAll(".name")]) {
      one.textContent = name;
    }
    this.element.setAttribute("aria-label", `${name}: answer`);
    this._copy = copyButton(`Copy the answer of ${name}`, () => this.text);
    this._copy.hidden = true;
    this.element.querySelector("header").append(this._copy);
    this.draw();
  }

  start() {
    this.state = "running";
    this.draw();
  }

  /** Take in a chunk of the stream. */
  accept(chunk) {
    if (chunk.warning) this._note(chunk.warning);
    const choice = chunk.choices?.[0];
    const content = choice?.delta?.content ?? "";
    this.text += content;
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.wedlm) {
      const { step, token_ids: ids, tokens } = chunk.wedlm;
      tokens.forEach((text, i) => this._append(text, step, `forward ${step}, token ${ids[i]}`));
      this.forwards = step + 1;
      this._count(ids.length);
    } else if (content) {
      this._append(content, this.tokens, `chunk ${this.tokens}`);
      this._count(1); // until the usage tells
    }
  }

  end(state) {
    this.state = state;
    if (this.usage?.completion_tokens) this.tokens = this.usage.completion_tokens;
    if (this.usage?.forwards) this.forwards = this.usage.forwards;
    this._finish();
  }

  /** Tokens a second after the first ones, so that neither the prompt nor its reuse counts; 0 before there are any. */
  get rate() {
    const until = this.state === "running" ? performance.now() : this.last;
    return this.tokens > this.first && until > this.began
      ? (1000 * (this.tokens - this.first)) / (until - this.began)
      : 0;
  }

  /** All that `restore` needs. What is still running counts as stopped. */
  snapshot() {
    const { text, pieces, tokens, first, began, last, forwards, usage } = this;
    const state = ["done", "failed"].includes(this.state) ? this.state : "stopped";
    const note = this.element.querySelector(".note").textContent;
    return { text, pieces, tokens, first, began: 0, last: last - began, forwards, usage, state, note };
  }

  restore({ note, ...fields }) {
    Object.assign(this, fields);
    if (note) this._note(note);
    this._finish();
  }

  /** Whether the text is shown as Markdown or as it was written. */
  showFormatted(formatted) {
    this._formatted = formatted;
    this._drawn = this._plain = this._rest = 0;
    this._drawText();
  }

  /** At the end the bar shows the speed, as a share of the faster side's. */
  compare(share) {
    this._bar.style.width = `${100 * share}%`;
  }

  badge(text) {
    const badge = this.element.querySelector(".badge");
    badge.textContent = text;
    badge.hidden = false;
  }

  draw() {
    const share = this.state === "done" ? 1 : Math.min(1, this.tokens / this.maxTokens);
    this.compare(share);
    const speed = this.rate ? this.rate.toFixed(1) : "–";
    const ends = { waiting: "waiting", stopped: `${speed} tok/s, stopped`, failed: "failed" };
    this.lap.querySelector(".rate").textContent = ends[this.state] ?? `${speed} tok/s`;
    this._figure("tokens", String(this.tokens));
    this._figure("rate", speed);
    if (this.forwards) {
      this._figure("forwards", String(this.forwards));
      this._figure("perForward", (this.tokens / this.forwards).toFixed(2));
    }
    if (this.usage?.p_cache) this._figure("pCache", this.usage.p_cache.toFixed(3));
    this._drawText();
  }

  _finish() {
    this.element.classList.toggle("cut", this.state !== "done" && this.tokens > 0);
    this._copy.hidden = !this.text;
    this._rest = 0;
    this.draw();
    if (!this.pieces.length) this._shown.replaceChildren(this.state === "done" ? "(empty answer)" : "(no answer)");
  }

  /** Bring the text up to date: what is new of plain text, all of a formatted one, which may change with each word. */
  _drawText() {
    if (this._drawn === this.pieces.length || performance.now() < this._rest) return;
    const begun = performance.now();
    const made = this._formatted ? format(this.pieces.map((piece) => piece.text).join("")) : null;
    this._shown.classList.toggle("formatted", made !== null);
    if (made) {
      mark(made, this.pieces, colour);
      made.querySelectorAll("pre").forEach(withCopy);
      this._shown.replaceChildren(made);
    } else {
      if (!this._plain) this._shown.replaceChildren();
      this._shown.append(...this.pieces.slice(this._plain).map((piece) => colour(piece, piece.text)));
    }
    this._drawn = this.pieces.length;
    this._plain = made ? 0 : this._drawn;
    this._rest = performance.now() + RESTS * (performance.now() - begun);
  }

  _count(added) {
    if (!added) return;
    this.last = performance.now();
    if (!this.tokens) {
      this.first = added;
      this.began = this.last;
    }
    this.tokens += added;
    this.groups += 1;
  }

  _append(text, step, title) {
    if (text) this.pieces.push({ text, step, title, colour: this.groups % NUM_COLOURS });
  }

  _note(sentence) {
    const note = this.element.querySelector(".note");
    note.textContent = sentence;
    note.hidden = false;
  }

  _figure(name, value) {
    this.element.querySelector(`[data-figure="${name}"]`).textContent = value;
  }
}

/** A piece's text in its forward's colour: a text node, never HTML. */
function colour(piece, text) {
  const token = document.createElement("span");
  token.className = `token c${piece.colour}`;
  token.dataset.step = piece.step;
  token.title = piece.title;
  token.textContent = text;
  return token;
}

/** A block of code in a frame with a button that copies it. */
function withCopy(pre) {
  const frame = document.createElement("div");
  frame.className = "code";
  const code = pre.textContent;
  pre.replaceWith(frame);
  frame.append(
    pre,
    copyButton("Copy the code", () => code),
  );
}
