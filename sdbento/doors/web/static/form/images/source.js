// The image that a request starts from, and what is done with it.
import { html } from "../../lib/html.js";
import { Icon } from "../../lib/icons.js";
import { useStore } from "../../lib/store.js";
import { ErrorOf, clearError } from "../errors.js";
import { Folded, NumberField, Range, Select } from "../fields.js";
import { onlyDrops, readImage } from "./files.js";
import { Mask } from "./mask.js";
import { Margins } from "./margins.js";
import { offerSettings } from "../restore.js";
import { MASK_BLUR } from "../request.js";
import { change, settings } from "../settings.js";

const USES = [
  ["change", "Change it"],
  ["repaint", "Repaint a part"],
  ["extend", "Extend it"],
  ["enlarge", "Enlarge it"],
];

// `offer`: to restore the settings that the file may have
export async function startFrom(file, { offer = true } = {}) {
  const image = await readImage(file);
  if (!image) return;
  clearError("image");
  change({ image, mask_image: null });
  if (offer) await offerSettings(file);
}

export function Source() {
  const { image, use } = useStore(settings);
  return html`<${Folded} title="Start from an image" open=${Boolean(image)} summary=${image && `${image.width} × ${image.height}`}>
    <div data-param="image" ...${onlyDrops(startFrom)}>
      ${image ? html`<${Chosen} ...${{ image, use }} />` : html`<${Chooser} />`}
      <${ErrorOf} param="image" />
    </div>
  <//>`;
}

export function Chooser({ label = "Choose an image", hint = "or drop it, or paste it", take = startFrom, id = "image-file" }) {
  const choose = ({ target }) => {
    if (target.files[0]) take(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  };
  return html`<label class="drop" for=${id}>
    <${Icon} name="image" /><span>${label}</span>
    <span class="hint">${hint}</span>
    <input id=${id} type="file" accept="image/*" onChange=${choose} />
  </label>`;
}

function Chosen({ image, use }) {
  const remove = () => change({ image: null, mask_image: null, use: "change" });
  return html`<fieldset class="uses">
      <legend class="unseen">What to do with the image</legend>
      ${USES.map(
        ([value, label]) => html`<label class="choice">
          <input type="radio" name="use" checked=${use === value} onChange=${() => change({ use: value })} />
          <span>${label}</span>
        </label>`,
      )}
    </fieldset>
    ${use === "repaint" && html`<${Mask} key=${image.address} image=${image} />`}
    ${use === "extend" && html`<${Margins} image=${image} />`}
    ${(use === "change" || use === "enlarge") && html`<img class="source" src=${image.address} alt="The image to start from" />`}
    <button type="button" class="link" onClick=${remove}>Remove the image</button>
    <${Options} use=${use} />`;
}

function Options({ use }) {
  if (use === "enlarge") {
    return html`<div class="row">
      <${NumberField} name="enlarge_scale" label="Times as large" min="1" max="8" step="0.5" param="upscale.scale" />
      <${Range} name="enlarge_strength" label="New detail" min="0.05" max="1" step="0.05" param="upscale.strength" />
    </div>`;
  }
  return html`<${Range} name="strength" label="Strength" min="0.05" max="1" step="0.05" otherwise=${use === "change" ? "0.8" : "1"} />
    ${use === "repaint" && html`<${MaskOptions} />`}
    ${use === "change" && html`<${Select} name="resize_mode" label="If the size differs" options=${RESIZING} />`}`;
}

const RESIZING = [
  ["stretch", "stretch the image"],
  ["crop", "crop it"],
  ["fit", "fit it, and fill the margins"],
];

function MaskOptions() {
  return html`<div class="row">
    <${NumberField} name="mask_blur" label="Blur of the mask's edge" min="0" max="128" placeholder=${MASK_BLUR} />
    <${NumberField} name="padding_mask_crop" label="Only the masked region, and pixels around it" min="0" placeholder="off" />
  </div>`;
}
