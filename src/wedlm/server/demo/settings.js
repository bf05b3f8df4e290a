// SPDX-License-Identifier: Apache-2.0
// The settings beside the conversation: what they say, and the two sides of a race made of them.

import { otherServer, ownServer } from "./api.js";
import { byId } from "./top.js";

export const NAMES = {
  verified: "Verified",
  auto: "Auto",
  streaming: "Streaming",
  block: "Block",
  autoregressive: "Autoregressive",
};
const HINTS = {
  verified: "Masked rows draft, the AR head checks in the same forward: autoregressive text, in fewer forwards.",
  auto: "Verified with as many rows as pay at the time, down to one: the same text, as fast as the machine allows.",
  streaming: "A window slides; positions are filled as soon as they are certain enough.",
  block: "A block is filled as a whole before the next one begins.",
  autoregressive: "One token a forward: the baseline.",
};
const WINDOW = { verified: "Rows in a forward", auto: "Most rows in a forward", streaming: "Window size W", block: "Block size W" };
const ORDER_HINTS = {
  apart: "The left one first; each has the machine to itself, so tok/s compares the time that they take.",
  together:
    "Both share this server's forwards until one is done, so each slows the other: tok/s is what a busy server gives, " +
    "and tokens / forward compares the two.",
};
const number = (id) => Number(byId(id).value);

/** Keep labels, hints and the fields that a choice needs up to date. */
export function watchSettings() {
  byId("settings-form").addEventListener("input", show);
  byId("settings-form").addEventListener("submit", (event) => event.preventDefault());
  show();
}

function show() {
  const mode = chosenMode();
  byId("mode-hint").textContent = HINTS[mode];
  byId("window-label").textContent = WINDOW[mode] ?? "Window size";
  for (const slider of document.querySelectorAll(".slider")) {
    const input = slider.querySelector("input");
    slider.hidden = Boolean(slider.dataset.modes) && !slider.dataset.modes.split(" ").includes(mode);
    slider.querySelector("output").value = input.value;
  }
  const rival = byId("rival").value;
  byId("other").hidden = rival !== "other";
  byId("order-field").hidden = rival === "none";
  byId("order-hint").hidden = rival !== "ar";
  byId("order-hint").textContent = ORDER_HINTS[byId("order").value];
}

export function chosenMode() {
  return document.querySelector("input[name=mode]:checked").value;
}

export function wantsMarkdown() {
  return byId("markdown").checked;
}

export function ownKey() {
  return byId("key").value.trim();
}

/** What a turn needs. ServerError if the other server's address is none. */
export function readSettings() {
  const mode = chosenMode();
  const left = { name: NAMES[mode], server: ownServer(ownKey()), body: ownBody(mode) };
  if (byId("trace").checked) left.body.wedlm_trace = true;
  const sides = [left];
  const rival = byId("rival").value;
  // One seed for both: verified text is autoregressive text at any temperature, for the same seed.
  const seed = Math.floor(Math.random() * 2 ** 31);
  left.body.seed = seed;
  if (rival === "ar") {
    const name = mode === "autoregressive" ? "Autoregressive, again" : NAMES.autoregressive;
    sides.push({ name, server: ownServer(ownKey()), body: { ...ownBody("autoregressive"), seed } });
  } else if (rival === "other") {
    const server = otherServer(byId("other-url").value.trim(), byId("other-key").value.trim());
    const model = byId("other-model").value.trim();
    sides.push({ name: model || new URL(server.base).host, server, model, body: common() });
  }
  const together = byId("order").value === "together";
  return { sides, together, maxTokens: number("max-tokens"), formatted: wantsMarkdown() };
}

/** How many positions the left side's window may reach beyond its answer. */
export function windowReach() {
  return chosenMode() === "autoregressive" ? 1 : number("window");
}

function common() {
  return { temperature: number("temperature"), max_tokens: number("max-tokens") };
}

function ownBody(mode) {
  const body = { ...common(), decoding: mode };
  if (mode === "autoregressive") return body;
  body.wedlm_window_size = number("window");
  if (mode === "verified" || mode === "auto") return { ...body, wedlm_draft_entropy: number("draft") };
  return { ...body, wedlm_entropy_threshold: number("threshold"), wedlm_pos_penalty_factor: number("penalty") };
}
