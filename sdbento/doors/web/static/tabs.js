// The views beside the form. The first is shown at first; with one view there are no tabs.
import { Batch } from "./batch/panel.js";
import { html } from "./lib/html.js";
import { useState } from "./vendor/hooks.js";
import { Pictures } from "./pictures/panel.js";

const TABS = [
  ["Pictures", Pictures],
  ["Batch", Batch],
];
const MOVES = { ArrowLeft: -1, ArrowRight: 1 };

export function Tabs() {
  const [chosen, choose] = useState(0);
  const onKeyDown = (event) => {
    const next = chosen + (MOVES[event.key] ?? 0);
    if (next === chosen || !TABS[next]) return;
    choose(next);
    document.getElementById(`tab-${next}`).focus();
  };
  const [, Panel] = TABS[chosen];
  if (TABS.length === 1) return html`<section class="stage" id="panel" aria-label="Results"><${Panel} /></section>`;
  return html`<section class="stage">
    <div class="tabs" role="tablist" aria-label="Views" onKeyDown=${onKeyDown}>
      ${TABS.map(
        ([name], i) => html`<button type="button" role="tab" id=${`tab-${i}`} aria-controls="panel" aria-selected=${String(i === chosen)} tabIndex=${i === chosen ? 0 : -1} onClick=${() => choose(i)}>${name}</button>`,
      )}
    </div>
    <div id="panel" role="tabpanel" aria-labelledby=${`tab-${chosen}`}><${Panel} /></div>
  </section>`;
}
