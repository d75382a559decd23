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
  const name = modelNamed(model, known)?.name;
  return html`<div class="empty">
    <h2>Nothing made yet</h2>
    <p>Write what you want to see, and press Generate <span class="keys">(<kbd>Ctrl</kbd> <kbd>Enter</kbd>)</span>.</p>
    ${Object.hasOwn(EMBEDDED, name) && html`<${Example} name=${name} />`}
    <p>Drop a picture here to start from it. One that was made by sdbento or AUTOMATIC1111's web UI gives you its settings back.</p>
  </div>`;
}

// The embedded models know few words, which nobody can guess.
const EMBEDDED = {
  emoji: { draws: "what there are emoji for", example: "a red apple on a blue background" },
  shapes: { draws: "coloured shapes", example: "a large red circle on a blue background" },
};

function Example({ name }) {
  const { draws, example } = EMBEDDED[name];
  const make = () => {
    change({ prompt: example });
    submit();
  };
  return html`<p>This server runs <b>${name}</b>, a small model to try things with. It only draws ${draws}:</p>
    <button type="button" onClick=${make}>Make “${example}”</button>`;
}
