// SPDX-License-Identifier: Apache-2.0
// A turn of the conversation: one prompt, one or two answers, and who was faster.

import { Answer } from "./answer.js";
import { chat, firstModel } from "./api.js";

const DRAW = 0.02; // speeds that differ by less are called equal

/** Puts the turn on the page. `sides`: [{name, server, model, body, onChunk?}], the left one first. */
export function makeTurn(prompt, sides, maxTokens) {
  const element = document.getElementById("turn-template").content.cloneNode(true).querySelector(".turn");
  element.querySelector(".prompt").textContent = prompt;
  const answers = sides.map((side) => new Answer(side.name, maxTokens));
  element.querySelector(".race").append(...answers.map((one) => one.lap));
  element.querySelector(".lanes").append(...answers.map((one) => one.element));
  return { element, answers, sides };
}

/** Runs the sides, at once or one after the other. A side that fails tells `onError` and leaves the other alone. */
export async function runTurn({ answers, sides, element }, { together, signal, onError }) {
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
  return conclude(element, answers, sides, together);
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

/** Verified text is autoregressive text up to rounding; of the other modes nobody expects it. */
function why(sides) {
  const modes = sides.map((side) => side.body.decoding);
  return modes.includes("verified") || modes.includes("auto") ? ": where two tokens are nearly tied, rounding may choose (not so in float32)" : "";
}

/** Who won, and the speeds; the marks on the two sides. */
function judge(answers, shared) {
  const [fast, slow] = answers[0].rate >= answers[1].rate ? answers : [answers[1], answers[0]];
  const ratio = fast.rate / slow.rate;
  const speeds = `${fast.rate.toFixed(1)} against ${slow.rate.toFixed(1)} tok/s${shared ? " in shared forwards" : ""}`;
  if (ratio < 1 + DRAW) return ["A draw", speeds];
  fast.badge(`${ratio.toFixed(2)}×`);
  fast.element.classList.add("winner");
  fast.lap.classList.add("winner");
  slow.compare(1 / ratio);
  return [`${fast.name} is ${ratio.toFixed(2)}× as fast`, speeds];
}

/** The sentence at the end of a race of two whole answers; empty if there was none. */
function conclude(element, answers, sides, together) {
  if (answers.length < 2 || answers.some((one) => one.state !== "done")) return "";
  const sameModel = sides.every((side) => side.server.own);
  const [winner, speeds] = answers.every((one) => one.rate)
    ? judge(answers, together && sameModel)
    : ["No winner", "an answer came too quickly to be timed"];
  const same = answers[0].text === answers[1].text ? " Both texts are the same." : ` The texts differ${why(sides)}.`;
  const verdict = document.createElement("p");
  verdict.className = "verdict";
  const strong = document.createElement("strong");
  strong.textContent = winner;
  verdict.append(strong, `: ${speeds}.${sameModel ? same : ""}`);
  element.querySelector(".race").append(verdict);
  return verdict.textContent;
}
