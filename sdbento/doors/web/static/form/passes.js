// Second passes: at a larger size, or by SDXL's refiner.
import { html } from "../lib/html.js";
import { useStore } from "../lib/store.js";
import { offers } from "../server/offers.js";
import { ErrorOf } from "./errors.js";
import { Check, Folded, NumberField, Range, Select } from "./fields.js";
import { useSetting } from "./settings.js";

const UPSCALERS = ["lanczos", "bicubic", "nearest", "latent"].map((name) => [name, name]);

export function Passes({ model }) {
  const [hires] = useSetting("hires");
  const [refiner] = useSetting("refiner");
  const summary = [hires && "larger", refiner && "refiner"].filter(Boolean).join(", ");
  return html`<${Folded} title="Second pass" summary=${summary} open=${hires || refiner}>
    <div data-param="hires">
      <${Check} name="hires" label="Enlarge, and denoise again" />
      ${hires && html`<${Hires} />`}
      <${ErrorOf} param="hires" />
    </div>
    ${(refiner || model?.family === "sdxl") &&
    html`<div data-param="refiner">
      <${Check} name="refiner" label="Let a refiner do the last steps" />
      ${refiner && html`<${Refiner} />`}
      <${ErrorOf} param="refiner" />
    </div>`}
  <//>`;
}

function Hires() {
  return html`<div class="row">
      <${NumberField} name="hires_scale" label="Times as large" min="1" max="8" step="0.1" param="hires.scale" />
      <${NumberField} name="hires_steps" label="Steps of this pass" min="1" placeholder="as the first" param="hires.steps" />
    </div>
    <${Range} name="hires_strength" label="Strength of this pass" min="0.05" max="1" step="0.05" param="hires.strength" />
    <${Select} name="hires_upscaler" label="Enlarged by" options=${UPSCALERS} param="hires.upscaler" />`;
}

function Refiner() {
  const { models } = useStore(offers);
  const options = models.filter(({ refines }) => refines).map(({ name }) => [name, name]);
  return html`<${Select} name="refiner_model" label="Refiner" options=${[["", "SDXL's own"], ...options]} param="refiner.model" />
    <${Range} name="switch_at" label="After this share of the noise" min="0.05" max="0.95" step="0.05" param="refiner.switch_at" />`;
}
