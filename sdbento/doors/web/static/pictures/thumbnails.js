// All pictures, small. Arrow keys go from one to the next, Delete deletes the one that is shown.
import { html } from "../lib/html.js";
import { decode } from "../lib/numbers.js";
import { useEffect, useRef } from "../vendor/hooks.js";
import { addressOf, remove, removeAll, show } from "./gallery.js";

const MOVES = { ArrowLeft: -1, ArrowRight: 1 };

export function Thumbnails({ pictures, shown }) {
  const list = useRef();
  const hadFocus = useRef(false);
  const at = pictures.findIndex(({ id }) => id === shown);
  useEffect(() => {
    if (hadFocus.current) list.current.querySelector(`[data-id="${shown}"]`)?.focus();
    hadFocus.current = false;
  }, [shown]);
  const onKeyDown = (event) => {
    const next = pictures[{ Home: 0, End: pictures.length - 1 }[event.key] ?? at + MOVES[event.key]];
    if (!next && event.key !== "Delete") return;
    event.preventDefault();
    hadFocus.current = true;
    if (next) show(next.id);
    else remove(pictures[at]);
  };
  return html`<section class="gallery" aria-label="Pictures">
    <div class="row">
      <h2>${pictures.length === 1 ? "1 picture" : `${pictures.length} pictures`} <span class="hint">in this browser</span></h2>
      ${pictures.length > 1 && html`<button type="button" class="danger quiet" onClick=${removeAll}>Delete all</button>`}
    </div>
    <ul class="thumbnails" ref=${list} onKeyDown=${onKeyDown}>
      ${pictures.map(
        (picture) => html`<li key=${picture.id}>
          <button type="button" data-id=${picture.id} tabIndex=${picture.id === shown ? 0 : -1} aria-pressed=${String(picture.id === shown)} aria-label=${nameOf(picture)} onClick=${() => show(picture.id)}>
            <img src=${addressOf(picture)} alt="" loading="lazy" />
          </button>
        </li>`,
      )}
    </ul>
  </section>`;
}

const nameOf = ({ request, seed }) => `${decode(request).prompt || "untitled"}, #${seed}`;
