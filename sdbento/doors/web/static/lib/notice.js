// One short message at the bottom of the page, maybe with something to do about it.
import { html } from "./html.js";
import { Icon } from "./icons.js";
import { store, useStore } from "./store.js";

const SECONDS = 8;
const current = store(null);
let timer = 0;

// `actions`: {label: function}
export function notify(text, actions = {}) {
  current.set({ text, actions });
  leaveSoon();
}

const stay = () => clearTimeout(timer);

function leaveSoon() {
  stay();
  timer = setTimeout(dismiss, SECONDS * 1000);
}

function dismiss() {
  stay();
  current.set(null);
}

export function Notice() {
  const notice = useStore(current);
  const whileUsed = { onMouseEnter: stay, onMouseLeave: leaveSoon, onFocusIn: stay, onFocusOut: leaveSoon };
  return html`<div class="notice" role="status" hidden=${!notice} ...${whileUsed}>
    ${notice &&
    html`<span>${notice.text}</span>
      ${Object.entries(notice.actions).map(
        ([label, act]) => html`<button type="button" class="link" onClick=${() => (dismiss(), act())}>${label}</button>`,
      )}
      <button type="button" class="icon" aria-label="Close this message" onClick=${dismiss}><${Icon} name="remove" /></button>`}
  </div>`;
}
