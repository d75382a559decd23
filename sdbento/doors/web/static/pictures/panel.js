// What is being made, the picture shown, and all others.
import { html } from "../lib/html.js";
import { useStore } from "../lib/store.js";
import { gallery } from "./gallery.js";
import { announced, generations } from "./generations.js";
import { Running } from "./running.js";
import { Shown } from "./shown.js";
import { Thumbnails } from "./thumbnails.js";

export function Pictures() {
  const { pictures, shown, loaded } = useStore(gallery);
  const busy = useStore(generations).length > 0;
  const picture = pictures.find(({ id }) => id === shown) ?? pictures[0];
  return html`<div class="pictures" id="pictures">
    <${Running} />
    <p class="unseen" aria-live="polite">${useStore(announced)}</p>
    ${picture && html`<${Shown} key=${picture.id} picture=${picture} />`}
    ${pictures.length > 1 && html`<${Thumbnails} pictures=${pictures} shown=${picture.id} />`}
    ${loaded && !picture && !busy && html`<${Empty} />`}
  </div>`;
}

function Empty() {
  return html`<div class="empty">
    <h2>Nothing made yet</h2>
    <p>Write what you want to see, and press Generate <span class="keys">(<kbd>Ctrl</kbd> <kbd>Enter</kbd>)</span>.</p>
    <p>Drop a picture here to start from it, or one that was made by sdbento or AUTOMATIC1111's web UI to have its settings back.</p>
  </div>`;
}
