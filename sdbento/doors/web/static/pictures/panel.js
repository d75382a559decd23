// What is being made, the picture shown, and all others.
import { submit } from "../form/form.js";
import { change, settings } from "../form/settings.js";
import { html } from "../lib/html.js";
import { useStore } from "../lib/store.js";
import { modelNamed, offers } from "../server/offers.js";
import { gallery } from "./gallery.js";
import { announced, generations } from "./making/generations.js";
import { Running } from "./making/running.js";
import { Shown } from "./shown.js";
import { Thumbnails } from "./thumbnails.js";

export function Pictures() {
  const { pictures, shown, loaded } = useStore(gallery);
  const picture = pictures.find(({ id }) => id === shown) ?? pictures[0];
  return html`<div class="pictures" id="pictures">
    <${Running} />
    <${Announced} />
    ${picture && html`<${Shown} picture=${picture} />`}
    ${picture && html`<${Thumbnails} pictures=${pictures} shown=${picture.id} />`}
    ${loaded && !picture && html`<${Empty} />`}
  </div>`;
}

function Announced() {
  return html`<p class="unseen" aria-live="polite">${useStore(announced)}</p>`;
}

function Empty() {
  const { model } = useStore(settings);
  const known = useStore(offers);
  if (useStore(generations).length) return null;
  return html`<div class="empty">
    <h2>Nothing made yet</h2>
    <p>Write what you want to see, and press Generate <span class="keys">(<kbd>Ctrl</kbd> <kbd>Enter</kbd>)</span>.</p>
    ${modelNamed(model, known)?.name === "shapes" && html`<${Example} />`}
    <p>Drop a picture here to start from it. One that was made by sdbento or AUTOMATIC1111's web UI gives you its settings back.</p>
  </div>`;
}

const EXAMPLE = "a large red circle on a blue background";

// The embedded model knows few words, which nobody can guess.
function Example() {
  const make = () => {
    change({ prompt: EXAMPLE });
    submit();
  };
  return html`<p>This server runs <b>shapes</b>, a tiny model to try things with. All it can draw are coloured shapes:</p>
    <button type="button" onClick=${make}>Make “${EXAMPLE}”</button>`;
}
