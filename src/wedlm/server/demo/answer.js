// SPDX-License-Identifier: Apache-2.0
// One side of a race: the answer's text, coloured by forward, its progress bar and its figures.

export const NUM_COLOURS = 6;

/** Other servers do not tell which forward made a token final: there a chunk takes a forward's place. */
export class Answer {
  constructor(name, maxTokens) {
    const parts = document.getElementById("lane-template").content.cloneNode(true);
    this.lap = parts.querySelector(".lap");
    this.element = parts.querySelector(".answer");
    this.name = name;
    this.maxTokens = maxTokens;
    this.text = "";
    this.tokens = 0;
    this.first = 0; // how many of them came first, together, at the time `began`; the latest came at `last`
    this.forwards = null;
    this.groups = 0; // forwards that made tokens final; the colours follow them, so that neighbours differ
    this.usage = null;
    this.state = "waiting"; // then running, and at last done, stopped or failed
    this._shown = this.element.querySelector(".text");
    this._bar = this.lap.querySelector("i");
    for (const one of [...this.lap.querySelectorAll(".name"), ...this.element.querySelectorAll(".name")]) {
      one.textContent = name;
    }
    this.element.setAttribute("aria-label", `${name}: answer`);
    this.draw();
  }

  start() {
    this.state = "running";
    this.draw();
  }

  /** Take in a chunk of the stream. Model output becomes text nodes, never HTML. */
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
    this.element.classList.toggle("cut", state !== "done" && this.tokens > 0);
    if (!this._shown.hasChildNodes()) this._shown.append(state === "done" ? "(empty answer)" : "(no answer)");
    this.draw();
  }

  /** Tokens a second after the first ones, so that neither the prompt nor its reuse counts; 0 before there are any. */
  get rate() {
    const until = this.state === "running" ? performance.now() : this.last;
    return this.tokens > this.first && until > this.began
      ? (1000 * (this.tokens - this.first)) / (until - this.began)
      : 0;
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
    if (!text) return;
    const token = document.createElement("span");
    token.className = `token c${this.groups % NUM_COLOURS}`;
    token.dataset.step = step;
    token.title = title;
    token.textContent = text;
    this._shown.append(token);
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
