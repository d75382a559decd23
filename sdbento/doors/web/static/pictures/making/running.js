// A card for each generation that is under way or has failed.
import { html } from "../../lib/html.js";
import { seconds } from "../../lib/numbers.js";
import { useStore } from "../../lib/store.js";
import { useEffect, useState } from "../../vendor/hooks.js";
import { cancel, dismiss, generate, generations, progress } from "./generations.js";

export function Running() {
  const all = useStore(generations);
  const failed = all.filter(({ error }) => error);
  const running = all.filter(({ error }) => !error);
  return html`<ul class="running" aria-label="Being made">
    ${failed.map((one) => html`<li key=${one.id}><${Failed} failed=${one} /></li>`)}
    ${running.map((one, i) => html`<li key=${one.id}><${Card} generation=${one} isLarge=${i === 0} /></li>`)}
  </ul>`;
}

function Card({ generation, isLarge }) {
  const { request, images } = generation;
  const share = progress(generation);
  const prompt = request.prompt || "untitled";
  return html`<article class=${isLarge ? "card large" : "card"} aria-label=${prompt}>
    <div class=${`previews of-${Math.min(4, request.num_images ?? 1)}`}>
      ${Array.from({ length: request.num_images ?? 1 }, (_, i) => html`<${Preview} key=${i} image=${images[i]} number=${i + 1} request=${request} />`)}
    </div>
    <div class="state">
      <p class="prompt" dir="auto">${prompt}</p>
      <div class="bar" role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100" aria-valuenow=${Math.round(100 * share)} aria-valuetext=${stateOf(generation)}>
        <span style=${{ width: `${100 * share}%` }}></span>
      </div>
      <div class="row">
        <p class="hint">${stateOf(generation)}</p>
        <button type="button" title="Escape" onClick=${() => cancel(generation)}>Cancel</button>
      </div>
    </div>
  </article>`;
}

function Preview({ image, number, request }) {
  const shape = request.width && request.height ? { aspectRatio: `${request.width} / ${request.height}` } : {};
  return html`<div class="preview" style=${shape}>
    ${image?.preview ? html`<img src=${image.preview} alt=${`Preview of image ${number}`} />` : html`<span class="shimmer"></span>`}
  </div>`;
}

function stateOf({ images, sent, position, eta }) {
  const left = eta === null || eta === undefined ? "" : `, about ${seconds(eta)} left`;
  const steps = images.filter(Boolean);
  if (steps.length) {
    const done = Math.min(...steps.map(({ step }) => step));
    return `Step ${done} of ${steps[0].num_steps}${left}`;
  }
  if (!sent) return "Waiting until other pictures are done";
  if (position === undefined) return "Sending";
  if (position === 0) return eta === null ? "Loading the model" : `Beginning${left}`;
  return `Waiting beside ${position} ${position === 1 ? "other" : "others"}${left}`;
}

function Failed({ failed }) {
  const { request, error } = failed;
  const again = () => {
    dismiss(failed);
    generate(request);
  };
  return html`<article class="card failed" aria-label=${request.prompt || "untitled"}>
    <div class="state">
      <p class="error" role="alert">${error.message}</p>
      <p class="prompt" dir="auto">${request.prompt}</p>
      <div class="row">
        <${Wait} seconds=${error.retryAfter} />
        <button type="button" onClick=${again}>Try again</button>
        <button type="button" onClick=${() => dismiss(failed)}>Dismiss</button>
      </div>
    </div>
  </article>`;
}

// Counts down to when it is worth trying again.
function Wait({ seconds: given }) {
  const [left, setLeft] = useState(given);
  useEffect(() => {
    if (!left) return undefined;
    const timer = setTimeout(() => setLeft(left - 1), 1000);
    return () => clearTimeout(timer);
  }, [left]);
  if (!given) return html`<span class="hint"></span>`;
  return html`<span class="hint">${left > 0 ? `Worth trying again in ${left} s` : "Worth trying again now"}</span>`;
}
