// The form: a few knobs first, the rest folded.
import { html } from "../lib/html.js";
import { notify } from "../lib/notice.js";
import { useStore } from "../lib/store.js";
import { generate } from "../pictures/making/generations.js";
import { loadOffers, modelNamed, offers } from "../server/offers.js";
import { ControlNets } from "./images/controlnets.js";
import { clearErrors, placeError } from "./errors.js";
import { NumberField, Select, TextArea } from "./fields.js";
import { Loras } from "./loras.js";
import { Passes } from "./passes.js";
import { toRequest } from "./request.js";
import { Sampling } from "./sampling.js";
import { Seed } from "./seed.js";
import { EMPTY, replace, settings } from "./settings.js";
import { Sizes } from "./sizes.js";
import { Source } from "./images/source.js";

const NO_MASK = "Paint over what is to be repainted.";

// The picture, if it is made; an error that is about a field stands beside the field instead.
export function submit() {
  clearErrors();
  const now = settings.get();
  if (now.image && now.use === "repaint" && !now.mask_image) return placeError("mask_image", NO_MASK);
  setTimeout(bringPicturesIntoView); // once the new one is among them
  return generate(toRequest(now), ({ param, message }) => placeError(param, message));
}

// On a phone they are below the form. If the user has scrolled, the browser keeps what he sees where it is, and what is
// new would be above it.
function bringPicturesIntoView() {
  const pictures = document.getElementById("panel");
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (!scrollY && pictures.getBoundingClientRect().top < innerHeight / 2) return;
  pictures.scrollIntoView({ behavior: calm ? "auto" : "smooth" });
}

export function Form() {
  const known = useStore(offers);
  const { model: name } = useStore(settings);
  const model = modelNamed(name, known);
  const onSubmit = (event) => {
    event.preventDefault();
    submit();
  };
  return html`<form class="form" aria-label="What to make" noValidate onSubmit=${onSubmit}>
    <div class="knobs">
      <${TextArea} name="prompt" label="Prompt" rows="4" placeholder="What to draw" />
      <${TextArea} name="negative_prompt" label="Negative prompt" rows="2" placeholder="What to keep out of the picture" />
      <${Models} ...${known} />
      ${model ? html`<${Sizes} model=${model} />` : !known.error && html`<div class="sizes coming"></div>`}
      <div class="row three">
        <${NumberField} name="num_inference_steps" label="Steps" min="1" max="150" placeholder=${model?.num_inference_steps} />
        <${NumberField} name="guidance_scale" label="Guidance" min="0" max="50" step="0.5" placeholder=${model?.guidance_scale} />
        <${NumberField} name="num_images" label="Images" min="1" max="16" placeholder="1" />
      </div>
      <${Seed} />
      <${Source} />
      <${Sampling} model=${model} />
      <${Loras} />
      <${ControlNets} />
      <${Passes} model=${model} />
    </div>
    <div class="go">
      <button class="primary" title="Ctrl+Enter">Generate</button>
      <button type="button" onClick=${reset}>Reset</button>
    </div>
  </form>`;
}

function reset() {
  clearErrors();
  const undo = replace({ ...EMPTY });
  notify("All settings are as at first.", { Undo: undo });
}

function Models({ models, error }) {
  const own = models.find((model) => model.default)?.name;
  const drawing = models.filter((model) => !model.refines); // a refiner only goes on with another's picture
  const quickest = drawing.sort((one, other) => rank(other) - rank(one));
  const options = quickest.map((model) => [
    model.default ? "" : model.name,
    `${model.name}${model.loaded ? "" : " (not in memory)"}`,
  ]);
  if (!own) options.unshift(["", "the server's default"]);
  return html`<${Select} name="model" label="Model" options=${options} />
    ${error &&
    html`<p class="error" role="alert">${error} <button type="button" class="link" onClick=${loadOffers}>Ask again</button></p>`}`;
}

const rank = (model) => 2 * model.default + model.loaded;
