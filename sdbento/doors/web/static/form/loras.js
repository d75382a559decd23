// LoRAs, each with its weight.
import { html } from "../lib/html.js";
import { Icon } from "../lib/icons.js";
import { useStore } from "../lib/store.js";
import { modelNamed, offers } from "../server/offers.js";
import { ErrorOf, clearError } from "./errors.js";
import { Folded, Slider } from "./fields.js";
import { settings, useSetting } from "./settings.js";

export function Loras() {
  const offered = useStore(offers);
  const { model } = useStore(settings);
  const known = fitting(offered.loras, modelNamed(model, offered)?.name);
  const [loras, set] = useSetting("loras");
  const add = () => set([...loras, { model_id: known[0] ?? "", weight: 1 }]);
  const change = (i, changes) => {
    clearError("lora");
    set(loras.map((lora, j) => (i === j ? { ...lora, ...changes } : lora)));
  };
  const summary = loras.map(({ model_id, weight }) => `${model_id} ${weight}`).join(", ");
  return html`<${Folded} title="LoRAs" summary=${summary} open=${loras.length > 0}>
    <div data-param="lora">
      ${loras.map(
        (lora, i) => html`<${Lora} key=${i} ...${{ lora, i }} change=${(changes) => change(i, changes)}
          remove=${() => set(loras.filter((_, j) => j !== i))} />`,
      )}
      <datalist id="known-loras">${known.map((name) => html`<option value=${name}></option>`)}</datalist>
      <button type="button" onClick=${add}>Add a LoRA</button>
      <${ErrorOf} param="lora" />
    </div>
  <//>`;
}

// Names of those that the catalogue does not keep for another model.
function fitting(loras, model) {
  return loras.filter((lora) => !lora.model || lora.model === model).map((lora) => lora.name);
}

// Others than those that the server lists may be entered: ids on the Hub, where it allows that.
function Lora({ lora, i, change, remove }) {
  return html`<div class="item">
    <input list="known-loras" aria-label=${`LoRA ${i + 1}`} value=${lora.model_id} onInput=${(event) => change({ model_id: event.target.value })} />
    <label class="unseen" for=${`lora-${i}`}>Weight of LoRA ${i + 1}</label>
    <${Slider} id=${`lora-${i}`} min="-1" max="2" step="0.05" value=${lora.weight} onInput=${(event) => change({ weight: Number(event.target.value) })} />
    <button type="button" class="icon" aria-label=${`Remove LoRA ${i + 1}`} onClick=${remove}><${Icon} name="remove" /></button>
  </div>`;
}
