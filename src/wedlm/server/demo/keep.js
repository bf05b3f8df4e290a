// SPDX-License-Identifier: Apache-2.0
// The conversation over a reload: in this tab's session storage, which the browser empties when the tab closes.

const NAME = "wedlm-conversation-1"; // the form of what is stored

/** Stores turns, as `snapshot` in race.js makes them; the oldest go where there is no room. How many are stored. */
export function keep(turns) {
  for (let first = 0; first < turns.length; first++) {
    try {
      sessionStorage.setItem(NAME, JSON.stringify(turns.slice(first)));
      return turns.length - first;
    } catch {
      // QuotaExceededError, or storage is forbidden
    }
  }
  forget();
  return 0;
}

/** The turns that are stored; none where there is nothing that can be read. */
export function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(NAME)) ?? [];
  } catch {
    return [];
  }
}

export function forget() {
  try {
    sessionStorage.removeItem(NAME);
  } catch {
    // a browser that forbids storage has nothing to forget
  }
}
