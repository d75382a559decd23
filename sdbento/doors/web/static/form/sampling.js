// How an image is sampled, at which size, and as what kind of file: what most people leave alone.
import { html } from "../lib/html.js";
import { useStore } from "../lib/store.js";
import { offers, samplerNamed } from "../server/offers.js";
import { Folded, NumberField, Select } from "./fields.js";
import { change, settings } from "./settings.js";

const FORMATS = ["png", "jpeg", "webp"].map((name) => [name, name.toUpperCase()]);

export function Sampling({ model }) {
  const { samplers } = useStore(offers);
  const { scheduler, others, ...now } = useStore(settings);
  const schedules = samplerNamed(scheduler)?.sigmas ?? ["normal", "karras", "exponential", "beta"];
  const options = samplers.map(({ name }) => [name, name]);
  const own = model?.scheduler ? `the model's own (${model.scheduler})` : "the model's own";
  const size = now.width || now.height ? `${now.width || "?"} × ${now.height || "?"}` : "";
  return html`<${Folded} title="Size, sampler, file" summary=${[size, scheduler, now.sigmas].filter(Boolean).join(", ")}>
    <div class="row">
      <${NumberField} name="width" label="Width" min="64" max="4096" step="8" placeholder=${now.image?.width ?? model?.width} />
      <${NumberField} name="height" label="Height" min="64" max="4096" step="8" placeholder=${now.image?.height ?? model?.height} />
    </div>
    <${Select} name="scheduler" label="Sampler" options=${[["", own], ...options]} />
    <${Select} name="sigmas" label="Noise schedule" options=${[["", "the sampler's own"], ...schedules.map((name) => [name, name])]} />
    <div class="row">
      <${NumberField} name="clip_skip" label="CLIP skip" min="1" max="12" placeholder="0" />
      <${Select} name="output_format" label="File" options=${FORMATS} />
    </div>
    ${Object.keys(others).length > 0 &&
    html`<p class="hint">
      Also, as restored: ${Object.keys(others).join(", ")}.
      <button type="button" class="link" onClick=${() => change({ others: {} })}>Leave them out</button>
    </p>`}
  <//>`;
}
