// All pictures, small. Arrow keys go from one to the next, Delete deletes the one that is shown.
import { html } from "../lib/html.js";
import { decode } from "../lib/numbers.js";
import { addressOf, remove, show } from "./gallery.js";

const MOVES = { ArrowLeft: -1, ArrowRight: 1 };

export function Thumbnails({ pictures, shown }) {
  const onKeyDown = (event) => {
    const at = pictures.findIndex(({ id }) => id === shown);
    if (event.key === "Delete" && pictures[at]) return remove(pictures[at]);
    const next = pictures[at + MOVES[event.key]];
    if (!next) return undefined;
    event.preventDefault();
    show(next.id);
    return event.currentTarget.querySelector(`[data-id="${next.id}"]`)?.focus();
  };
  return html`<section aria-label="Pictures">
    <ul class="thumbnails" onKeyDown=${onKeyDown}>
      ${pictures.map(
        (picture) => html`<li key=${picture.id}>
          <button type="button" data-id=${picture.id} aria-pressed=${String(picture.id === shown)} aria-label=${nameOf(picture)} onClick=${() => show(picture.id)}>
            <img src=${addressOf(picture)} alt="" loading="lazy" />
          </button>
        </li>`,
      )}
    </ul>
  </section>`;
}

const nameOf = ({ request, seed }) => `${decode(request).prompt || "untitled"}, #${seed}`;
