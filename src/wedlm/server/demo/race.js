// SPDX-License-Identifier: Apache-2.0
// A turn of the conversation: one prompt, one or two answers, and who was faster.

import { Answer } from "./answer.js";
import { chat, firstModel } from "./api.js";

const DRAW = 0.02; // speeds that differ by less are called equal

/**
 * Puts the turn on the page. `sides`: [{name, server, model, body, onChunk?}], the left one first; `together`: at once
 * or one after the other; `formatted`: Markdown or as written.
 */
export function makeTurn(prompt, sides, { maxTokens, together, formatted }) {
  const element = document.getElementById("turn-template").content.cloneNode(true).querySelector(".turn");
  element.querySelector(".prompt").textContent = prompt;
  const answers = sides.map((side) => new Answer(side.name, maxTokens, formatted));
  element.querySelector(".race").append(...answers.map((one) => one.lap));
  element.querySelector(".lanes").append(...answers.map((one) => one.element));
  return { element, answers, sides, prompt, maxTokens, together };
}

/** A turn without its keys, as something that can be stored. */
export function snapshot({ prompt, sides, answers, maxTokens, together }) {
  return {
    prompt,
    maxTokens,
    together,
    sides: sides.map(({ name, server, body }) => ({ name, own: server.own, decoding: body.decoding })),
    answers: answers.map((one) => one.snapshot()),
  };
}

/** The turn of a snapshot. */
export function restoreTurn({ prompt, maxTokens, together, sides, answers }, formatted) {
  const remade = sides.map(({ name, own, decoding }) => ({ name, server: { own }, body: { decoding } }));
  const turn = makeTurn(prompt, remade, { maxTokens, together, formatted });
  turn.answers.forEach((one, i) => one.restore(answers[i]));
  conclude(turn);
  return turn;
}

/** Runs the sides. A side that fails tells `onError` and leaves the other alone. Resolves to the verdict, or "". */
export async function runTurn(turn, { signal, onError }) {
  const { answers, sides, together } = turn;
  let running = true;
  const draw = () => {
    answers.filter((one) => one.state === "running").forEach((one) => one.draw());
    if (running) requestAnimationFrame(draw);
  };
  requestAnimationFrame(draw);
  try {
    if (together) await Promise.all(sides.map((side, i) => runSide(side, answers[i], signal, onError)));
    else for (const [i, side] of sides.entries()) await runSide(side, answers[i], signal, onError);
  } finally {
    running = false;
  }
  return conclude(turn);
}

async function runSide(side, answer, signal, onError) {
  try {
    signal.throwIfAborted();
    const model = side.model || (await firstModel(side.server, signal));
    answer.start();
    for await (const chunk of chat(side.server, { ...side.body, model }, signal)) {
      answer.accept(chunk);
      side.onChunk?.(chunk);
    }
    answer.end("done");
  } catch (error) {
    if (error.name === "AbortError") return answer.end("stopped");
    answer.end("failed");
    onError(error, side);
  }
}

/** Verified text is autoregressive text up to rounding; other modes do not promise it. */
function why(sides) {
  const modes = sides.map((side) => side.body.decoding);
  if (!modes.includes("verified") && !modes.includes("auto")) return "";
  return " Where two tokens are nearly tied, rounding may choose (not so in float32).";
}

/** The speeds of both answers as [left, right] in words, and what else to compare where they shared forwards. */
function figures(answers, shared) {
  const speeds = `${answers.map((one) => one.rate.toFixed(1)).join(" against ")} tok/s`;
  if (!shared || !answers.every((one) => one.forwards)) return speeds;
  const each = answers.map((one) => (one.tokens / one.forwards).toFixed(2)).join(" against ");
  return `${speeds} in shared forwards, ${each} tokens a forward`;
}

/** Who won; the marks on the two sides. */
function judge(answers) {
  const [fast, slow] = answers[0].rate >= answers[1].rate ? answers : [answers[1], answers[0]];
  const ratio = fast.rate / slow.rate;
  if (ratio < 1 + DRAW) return "A draw";
  fast.badge(`${ratio.toFixed(2)}×`);
  fast.element.classList.add("winner");
  fast.lap.classList.add("winner");
  slow.compare(1 / ratio);
  return `${fast.name} is ${ratio.toFixed(2)}× as fast`;
}

/** The sentence at the end of a race of two whole answers; empty if there was none. */
function conclude({ element, answers, sides, together }) {
  if (answers.length < 2 || answers.some((one) => one.state !== "done")) return "";
  const sameModel = sides.every((side) => side.server.own);
  const verdict = document.createElement("p");
  verdict.className = "verdict";
  const strong = document.createElement("strong");
  const timed = answers.every((one) => one.rate);
  const speeds = timed ? figures(answers, together && sameModel) : "an answer came too quickly to be timed";
  if (answers[0].text !== answers[1].text) {
    // Another text is other work: its speed says nothing about the way of decoding alone.
    strong.textContent = "The texts differ, so there is no winner";
    verdict.append(strong, `: ${speeds}.${sameModel ? why(sides) : ""}`);
  } else {
    strong.textContent = timed ? judge(answers) : "No winner";
    verdict.append(strong, `: ${speeds}. Both texts are the same.`);
  }
  element.querySelector(".race").append(verdict);
  return verdict.textContent;
}
