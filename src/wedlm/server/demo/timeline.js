// SPDX-License-Identifier: Apache-2.0
// The window of the left answer: a row for each forward, a column for each position, and one forward in words.

import { NUM_COLOURS } from "./colours.js";

const MIN_CELL = 4;
const MAX_CELL = 12;
const MIN_ROW = 3;
const HOLLOW = 6; // lower rows have no room for outlines

/** Collects what the chunks of one answer tell of its window, and draws it. */
export class Timeline {
  constructor() {
    for (const id of ["timeline", "plot", "canvas", "forward", "forward-text", "chips"]) {
      this[id.replace("forward-text", "said")] = document.getElementById(id);
    }
    this.clear(0);
    this.forward.addEventListener("input", () => this._choose(Number(this.forward.value)));
    this.canvas.addEventListener("pointermove", (event) => this._point(event));
    this.canvas.addEventListener("pointerdown", (event) => this._point(event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this._redraw());
    new ResizeObserver(() => this._redraw()).observe(this.plot);
    this.timeline.addEventListener("toggle", () => this._redraw());
  }

  /** Forget the last answer. `positions`: how many the next one may take, window included. */
  clear(positions) {
    this.rows = []; // {step, first, added: [text], columns: [text or null], colour}: `first` tokens were final before
    this.positions = positions;
    this.committed = 0;
    this.groups = 0;
    this.follows = true; // the newest forward is the chosen one
    this.ended = false;
    this.timeline.hidden = true;
  }

  accept(chunk) {
    const news = chunk.wedlm;
    if (!news) return;
    const first = this.committed;
    this.committed += news.token_ids.length;
    const before = this.rows.at(-1);
    if (!news.window && !before) return; // an answer that is not recorded
    const columns = news.window ? news.window.tokens.slice(this.committed - news.window.start) : [];
    this.rows.push({ step: news.step, first, added: news.tokens, columns, colour: this.groups % NUM_COLOURS });
    if (news.tokens.length) this.groups += 1;
    this.timeline.hidden = false;
    this._redraw();
  }

  /** The answer is complete: it gets the whole width and, as far as rows stay visible, fits the height. */
  end() {
    this.positions = Math.max(0, ...this.rows.map((row) => row.first + row.added.length + row.columns.length));
    this._redraw();
    this.ended = true;
    this.plot.scrollTo(0, 0);
  }

  _redraw() {
    if (this._asked || this.timeline.hidden || !this.timeline.open) return;
    this._asked = requestAnimationFrame(() => {
      this._asked = 0;
      this._draw();
      this.forward.max = Math.max(0, this.rows.length - 1);
      if (this.follows) this.forward.value = this.forward.max;
      this._describe();
    });
  }

  _draw() {
    const cell = Math.floor(this.plot.clientWidth / Math.max(1, this.positions));
    const size = Math.max(MIN_CELL, Math.min(MAX_CELL, cell));
    const most = parseFloat(getComputedStyle(this.plot).maxHeight);
    this.row = this.ended ? Math.max(MIN_ROW, Math.min(size, Math.floor(most / this.rows.length))) : size;
    const [width, height] = [size * this.positions, this.row * this.rows.length];
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.max(1, width * scale);
    this.canvas.height = Math.max(1, height * scale);
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const ink = this.canvas.getContext("2d");
    ink.scale(scale, scale);
    const colours = palette(this.canvas);
    this.rows.forEach((row, y) => drawRow(ink, row, y, [size, this.row], colours));
    this._mark(ink, colours.chosen, width);
    const total = `${this.rows.length} forwards committed ${this.committed} tokens`;
    this.canvas.setAttribute("aria-label", `${total}. The slider below reads each forward out.`);
    if (this.follows && !this.ended) {
      const last = this.rows.at(-1);
      this.plot.scrollTo(size * (last.first + last.added.length) - this.plot.clientWidth / 2, height);
    }
  }

  /** A frame around the chosen forward's row, once it is not simply the newest. */
  _mark(ink, colour, width) {
    if (this.follows) return;
    const y = Number(this.forward.value);
    ink.strokeStyle = colour;
    ink.strokeRect(0.5, y * this.row - 0.5, width - 1, this.row + 1);
  }

  _point(event) {
    const y = Math.floor(event.offsetY / this.row);
    if (this.rows[y]) {
      this.forward.value = y;
      this._choose(y);
    }
  }

  _choose(index) {
    this.follows = index === this.rows.length - 1;
    this._redraw();
  }

  /** The chosen forward's tokens as chips. */
  _describe() {
    const row = this.rows[Number(this.forward.value)];
    if (!row) return;
    const filled = row.columns.filter((text) => text !== null).length;
    const masked = row.columns.length - filled;
    this.said.value = `${row.step}: ${row.added.length} committed, ${filled} filled, ${masked} masked`;
    this.forward.setAttribute("aria-valuetext", `forward ${this.said.value}`);
    this.chips.replaceChildren(
      ...row.added.map((text) => chip(text, `now c${row.colour}`, "committed")),
      ...row.columns.map((text) => (text === null ? chip("", "masked", "masked") : chip(text, "filled", "filled"))),
    );
  }
}

function chip(text, kind, title) {
  const one = document.createElement("span");
  one.className = `chip ${kind}`;
  one.title = title;
  one.textContent = text.replaceAll("\n", "↵") || (kind === "masked" ? "·" : "∅");
  return one;
}

/** Canvas colours from the style sheet, so that light and dark are said in one place. */
function palette(element) {
  const style = getComputedStyle(element);
  const get = (name) => style.getPropertyValue(name).trim();
  const steps = Array.from({ length: NUM_COLOURS }, (_, i) => get(`--strong-${i}`));
  return { steps, past: get("--trail"), filled: get("--filled"), masked: get("--outline"), thin: get("--thin"), chosen: get("--muted") };
}

function drawRow(ink, row, y, [size, tall], colours) {
  const gap = tall > HOLLOW ? 1.5 : 0.75;
  const [top, side, high] = [y * tall + gap / 2, size - gap, tall - gap];
  ink.fillStyle = colours.past;
  ink.fillRect(0, top, row.first * size, high);
  let x = row.first;
  ink.fillStyle = colours.steps[row.colour];
  for (const _ of row.added) ink.fillRect(x++ * size + gap / 2, top, side, high);
  ink.strokeStyle = colours.masked;
  for (const text of row.columns) {
    const left = x++ * size + gap / 2;
    ink.fillStyle = text === null ? colours.thin : colours.filled;
    if (text === null && tall > HOLLOW) ink.strokeRect(left + 0.5, top + 0.5, side - 1, high - 1);
    else ink.fillRect(left, top, side, high);
  }
}
