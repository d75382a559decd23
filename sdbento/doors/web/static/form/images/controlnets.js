// ControlNets, each with the image that steers it, and what is made of that image.
import { html } from "../../lib/html.js";
import { Icon } from "../../lib/icons.js";
import { useStore } from "../../lib/store.js";
import { json } from "../../server/calls.js";
import { offers } from "../../server/offers.js";
import { useEffect, useState } from "../../vendor/hooks.js";
import { ErrorOf, clearError } from "../errors.js";
import { Folded, Slider } from "../fields.js";
import { measure, onlyDrops, readImage } from "./files.js";
import { useSetting } from "../settings.js";
import { Chooser } from "./source.js";

const TYPES = "canny depth openpose scribble softedge lineart mlsd normal seg tile inpaint".split(" ");

export function ControlNets() {
  const [controlnet, set] = useSetting("controlnet");
  const add = () => set([...controlnet, { type: "canny", preprocess: true, conditioning_scale: 1 }]);
  const change = (i, changes) => {
    clearError("controlnet");
    set(controlnet.map((one, j) => (i === j ? { ...one, ...changes } : one)));
  };
  return html`<${Folded} title="ControlNet" summary=${controlnet.map(({ type }) => type).join(", ")} open=${controlnet.length > 0}>
    <div data-param="controlnet">
      ${controlnet.map(
        (one, i) => html`<${ControlNet} key=${i} ...${{ one, i }} change=${(changes) => change(i, changes)}
          remove=${() => set(controlnet.filter((_, j) => j !== i))} />`,
      )}
      <datalist id="controlnet-types">${TYPES.map((type) => html`<option value=${type}></option>`)}</datalist>
      <button type="button" onClick=${add}>Add a ControlNet</button>
      <${ErrorOf} param="controlnet" />
    </div>
  <//>`;
}

function ControlNet({ one, i, change, remove }) {
  const take = async (file) => change({ image: (await readImage(file))?.data });
  const name = `ControlNet ${i + 1}`;
  return html`<div class="item block">
    <div class="row">
      <input list="controlnet-types" aria-label=${`Type of ${name}`} value=${one.type} onInput=${(event) => change({ type: event.target.value })} />
      <button type="button" class="icon" aria-label=${`Remove ${name}`} onClick=${remove}><${Icon} name="remove" /></button>
    </div>
    <div ...${onlyDrops(take)}>
      ${one.image
        ? html`<${ControlImage} one=${one} /><button type="button" class="link" onClick=${() => change({ image: undefined })}>Another image</button>`
        : html`<${Chooser} label=${`Choose the image of ${name}`} hint="or drop it here" id=${`controlnet-file-${i}`} take=${take} />
            <p class="hint">Without one, the image to start from steers.</p>`}
    </div>
    <label class="check"><input type="checkbox" checked=${one.preprocess} onChange=${(event) => change({ preprocess: event.target.checked })} />
      Make the control image from it</label>
    <label for=${`controlnet-${i}`}>How strongly ${name} steers</label>
    <${Slider} id=${`controlnet-${i}`} min="0" max="2" step="0.05" value=${one.conditioning_scale ?? 1}
      onInput=${(event) => change({ conditioning_scale: Number(event.target.value) })} />
  </div>`;
}

// The image beside what the server makes of it.
function ControlImage({ one }) {
  const { modules } = useStore(offers);
  const [own, setOwn] = useState(null);
  const [made, setMade] = useState({});
  const module = one.preprocess && modules.includes(one.type) ? one.type : null;
  useEffect(() => void measure(one.image).then(setOwn), [one.image]);
  useEffect(() => {
    setMade({});
    if (!module) return undefined;
    const controller = new AbortController();
    const body = { controlnet_module: module, controlnet_input_images: [one.image] };
    json("controlnet/detect", { body, signal: controller.signal })
      .then(({ images: [image] }) => setMade({ image }))
      .catch((error) => error.name === "AbortError" || setMade({ error: error.message }));
    return () => controller.abort();
  }, [one.image, module]);
  return html`<div class="pair">
    ${own && html`<img src=${own.address} alt="The image that steers" />`}
    ${made.image && html`<img src=${`data:image/png;base64,${made.image}`} alt=${`Its control image: ${one.type}`} />`}
    ${made.error && html`<p class="error">${made.error}</p>`}
  </div>`;
}
