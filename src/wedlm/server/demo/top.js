// SPDX-License-Identifier: Apache-2.0
// What both pages have at their top: the status of this server, and the banner.

import { ServerError, firstModel, ownServer } from "./api.js";

export const byId = (id) => document.getElementById(id);

byId("banner-close").addEventListener("click", hideBanner);

/** Ask this server for its model's name; "" if it gives none, which status and banner then explain. */
export async function connected(key) {
  try {
    const model = await firstModel(ownServer(key));
    setStatus("ok", model);
    hideBanner();
    return model;
  } catch (error) {
    lost(error);
    return "";
  }
}

/** The server does not answer as it should. */
export function lost(error) {
  const needsKey = error.status === 401;
  setStatus("bad", needsKey ? "needs an API key" : "not connected");
  complain(error);
  if (needsKey) byId("key").focus({ preventScroll: true });
}

/** The banner shows the server's own sentence. What is no ServerError is a bug of this page, and says so. */
export function complain(error) {
  if (!(error instanceof ServerError)) console.error(error);
  byId("banner-text").textContent = error instanceof ServerError ? error.message : `This page failed: ${error.message}`;
  byId("banner").hidden = false;
}

export function hideBanner() {
  byId("banner").hidden = true;
}

function setStatus(kind, text) {
  byId("status").dataset.kind = kind;
  byId("status-text").textContent = text;
}
