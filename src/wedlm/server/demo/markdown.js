// SPDX-License-Identifier: Apache-2.0
// Markdown that a model wrote, as elements. HTML in it stays text, pictures become links, and a link is followed only
// by a click. What the libraries make is checked once more: nothing but the tags and attributes named here comes out.

const MAX_CHARS = 20_000; // a longer answer is shown as it was written
const MAX_DEPTH = 40; // beyond it the parser would leave contents out, so such a text is shown as it was written, too
const REACH = 1000; // how much markup may stand between two words
const CLEAN = {
  ALLOWED_TAGS: (
    "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre s strong table tbody td th thead tr ul #text"
  ).split(" "),
  ALLOWED_ATTR: ["class", "href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const parser = window.markdownit({ html: false, linkify: false, breaks: true, maxNesting: MAX_DEPTH });
parser.disable(["image", "reference"]); // the latter leaves out lines such as "[1]: address"
// Columns are aligned by inline styles, which the page's policy does not allow.
parser.core.ruler.push("no_styles", (state) => {
  for (const token of state.tokens) token.attrs = token.attrs?.filter(([name]) => name !== "style") ?? null;
});

/** The elements of a Markdown text; null if it is too long or too deep to be formatted. */
export function format(text) {
  if (text.length > MAX_CHARS) return null;
  const environment = {};
  const tokens = parser.parse(text, environment);
  if (tokens.some((token) => token.level >= MAX_DEPTH - 1)) return null;
  const made = window.DOMPurify.sanitize(parser.renderer.render(tokens, parser.options, environment), CLEAN);
  for (const link of made.querySelectorAll("a[href]")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
    link.title = link.href; // what it says and where it leads may differ
  }
  return made;
}

/**
 * Wraps the words below `root`, which was formatted from the joined texts of `pieces`, in what `wrap(piece, text)`
 * makes for the piece that each came from. Words that the source has in another spelling, such as entities, stay bare.
 */
export function mark(root, pieces, wrap) {
  const source = pieces.map((piece) => piece.text).join("");
  let [at, index, end] = [0, 0, pieces[0]?.text.length ?? 0];
  const nodes = [];
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) nodes.push(walker.currentNode);
  for (const node of nodes) {
    const parts = document.createDocumentFragment();
    let last = null; // the piece whose wrapped text is the end of `parts`
    for (const word of node.data.match(/\s+|\S+/g) ?? []) {
      const found = /\s/.test(word[0]) ? source.startsWith(word, at) : seek(word);
      if (!found) {
        parts.append(word);
        last = null;
        continue;
      }
      for (const stop = at + word.length; at < stop; ) {
        while (at >= end) end += pieces[++index].text.length;
        const text = source.slice(at, Math.min(end, stop));
        if (last === pieces[index]) parts.lastChild.append(text);
        else parts.append(wrap((last = pieces[index]), text));
        at += text.length;
      }
    }
    node.replaceWith(parts);
  }

  function seek(word) {
    const distance = source.slice(at, at + REACH + word.length).indexOf(word);
    if (distance < 0) return false;
    at += distance;
    return true;
  }
}
