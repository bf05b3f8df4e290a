// SPDX-License-Identifier: Apache-2.0
// Buttons that copy a text.

const SHOWN_MS = 1500;

/** A button named `label` that copies what `read()` returns. */
export function copyButton(label, read) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.setAttribute("aria-label", label);
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    const done = await copy(read());
    button.textContent = done ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = "Copy"), SHOWN_MS);
  });
  return button;
}

/** Whether the browser has let us. Pages of plain http from another machine have no clipboard but the old command. */
async function copy(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(
      () => true,
      () => false,
    );
  }
  const field = document.createElement("textarea");
  field.className = "hidden";
  field.value = text;
  document.body.append(field);
  const focused = document.activeElement;
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  focused?.focus({ preventScroll: true });
  return done;
}
