// SPDX-License-Identifier: Apache-2.0
// The page: a conversation with this server's model, each prompt answered as a race.

import { ServerError } from "./api.js";
import { forget, keep, kept } from "./keep.js";
import { makeTurn, restoreTurn, runTurn, snapshot } from "./race.js";
import { ownKey, readSettings, wantsMarkdown, watchSettings, windowReach } from "./settings.js";
import { Timeline } from "./timeline.js";
import { byId, complain, connected, hideBanner, lost } from "./top.js";

const [prompt, scroll, turns] = [byId("prompt"), byId("scroll"), byId("turns")];
const timeline = new Timeline();
let said = []; // the turns so far; the left answers are what the model is told
let model = "";
let running = null; // the AbortController of the turn in progress
let following = true; // the reader is at the end of the conversation

watchSettings();
restore();
connect();
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
prompt.addEventListener("input", grow);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
scroll.addEventListener("scroll", () => {
  following = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 120;
});
new ResizeObserver(follow).observe(scroll); // the plot appears, and takes some of the height
byId("stop").addEventListener("click", stop);
byId("reset").addEventListener("click", reset);
byId("key").addEventListener("change", connect);
byId("markdown").addEventListener("change", () => {
  for (const answer of said.flatMap((turn) => turn.answers)) answer.showFormatted(wantsMarkdown());
});
addEventListener("pagehide", () => said.length && keep(said.map(snapshot)));
byId("examples").addEventListener("click", (event) => {
  if (event.target.matches("button")) send(event.target.textContent);
});

async function connect() {
  model = await connected(ownKey());
}

async function send(text = prompt.value.trim()) {
  if (!text || running) return;
  hideBanner();
  let settings;
  try {
    settings = readSettings();
  } catch (error) {
    complain(error);
    return;
  }
  running = new AbortController();
  setBusy(true);
  const asked = [...messages(), { role: "user", content: text }];
  const [left] = settings.sides;
  left.model = model;
  const own = running;
  left.onChunk = (chunk) => {
    if (running !== own) return; // the conversation was reset while this was on its way
    timeline.accept(chunk);
    follow();
  };
  for (const side of settings.sides) {
    side.body.messages = asked;
    if (side.server.own) side.model = model;
  }
  timeline.clear(settings.maxTokens + windowReach());
  const turn = makeTurn(text, settings.sides, settings);
  show(turn);
  following = true;
  turn.element.scrollIntoView({ block: "start" });
  prompt.value = "";
  grow();
  announce("Answering.");
  finish(turn, await runTurn(turn, { signal: running.signal, onError: failed }));
}

function show(turn) {
  said.push(turn);
  byId("welcome").hidden = true;
  turns.append(turn.element);
}

/** The conversation that this tab had before it was loaded again. */
function restore() {
  try {
    for (const one of kept()) show(restoreTurn(one, wantsMarkdown()));
    follow();
  } catch (error) {
    forget(); // or the page would fail whenever it is loaded
    throw error;
  }
}

function messages() {
  return said
    .filter((turn) => turn.answers[0].text)
    .flatMap((turn) => [
      { role: "user", content: turn.prompt },
      { role: "assistant", content: turn.answers[0].text },
    ]);
}

/** Keep the answer, unless there is none: then the prompt goes back to be sent again. */
function finish(turn, verdict) {
  const [answer] = turn.answers;
  if (!turn.element.isConnected) return; // the conversation was reset meanwhile
  if (!answer.text && !prompt.value) prompt.value = turn.prompt;
  const stored = keep(said.map(snapshot));
  if (stored < said.length) complain(new ServerError(`Only the last ${stored} turns will be here after a reload.`));
  timeline.end();
  running = null;
  setBusy(false);
  follow();
  announce(`${answer.state === "done" ? "" : `The answer was ${answer.state}. `}${answer.text} ${verdict}`);
}

function failed(error, side) {
  if (side.server.own && error.status === 401) lost(error);
  else complain(error);
}

function stop() {
  running?.abort();
}

function reset() {
  stop();
  running = null;
  said = [];
  forget();
  turns.replaceChildren();
  timeline.clear(0);
  byId("welcome").hidden = false;
  hideBanner();
  setBusy(false);
  announce("New conversation.");
  prompt.focus();
}

function setBusy(busy) {
  const hadFocus = document.activeElement;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  turns.setAttribute("aria-busy", String(busy));
  // A button that vanishes must not take the keyboard's place with it.
  if (hadFocus === byId("send")) byId("stop").focus();
  else if (hadFocus === byId("stop") || hadFocus === document.body) prompt.focus({ preventScroll: true });
}

/** Keep the end in view for who is reading there, where the conversation scrolls by itself. */
function follow() {
  if (following) scroll.scrollTop = scroll.scrollHeight;
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function announce(text) {
  byId("announce").textContent = text;
}
