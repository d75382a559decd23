// The seed: drawn by the server unless one is entered.
import { html } from "../lib/html.js";
import { Icon } from "../lib/icons.js";
import { useStore } from "../lib/store.js";
import { NumberField } from "./fields.js";
import { change, lastSeed } from "./settings.js";

const SEEDS = 2 ** 32;

export function Seed() {
  const last = useStore(lastSeed);
  const draw = () => change({ seed: String(Math.floor(Math.random() * SEEDS)) });
  return html`<div class="seed">
    <${NumberField} name="seed" label="Seed" placeholder="random" min="-1" />
    <button type="button" class="tool" aria-label="Dice" title="Draw a number" onClick=${draw}>
      <${Icon} name="dice" />
    </button>
    <button type="button" class="tool" disabled=${last === ""} title=${last} onClick=${() => change({ seed: last })}>
      Reuse last
    </button>
  </div>`;
}
