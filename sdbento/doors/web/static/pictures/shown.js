// The picture that is looked at: large, with how it was made and what can be done with it.
import { html } from "../lib/html.js";
import { decode, seconds } from "../lib/numbers.js";
import { restore } from "../form/restore.js";
import { startFrom } from "../form/images/source.js";
import { Copies } from "./copies.js";
import { addressOf, fileName, remove } from "./gallery.js";
import { generate } from "./making/generations.js";
import { requestOf } from "./stored.js";

export function Shown({ picture }) {
  const request = decode(picture.request);
  const { width, height } = picture;
  return html`<article class="shown" aria-label="The picture shown">
    <a class="hero" key=${picture.id} href=${addressOf(picture)} target="_blank" rel="noopener" title="Open it by itself">
      <img decoding="sync" src=${addressOf(picture)} alt=${request.prompt || "untitled"} style=${{ aspectRatio: `${width} / ${height}` }} />
    </a>
    <div class="about">
      <p class="prompt" dir="auto">${request.prompt || "untitled"}</p>
      ${request.negative_prompt && html`<p class="hint" dir="auto">Not: ${request.negative_prompt}</p>`}
      <${Parameters} ...${picture} request=${request} />
      ${!picture.isKept && html`<p class="warning">The browser does not keep this picture: download it, or it is gone when this page is closed.</p>`}
      ${picture.warnings.map((warning) => html`<p class="warning">${warning}</p>`)}
      <${Actions} picture=${picture} />
    </div>
  </article>`;
}

function Actions({ picture }) {
  const again = async () => {
    const { seed: _, ...request } = await requestOf(picture); // another seed, else it would be the same picture
    generate(request);
  };
  const reuse = async () => restore(await requestOf(picture));
  return html`<div class="actions">
    <button type="button" title="The same with another seed" onClick=${again}>Again</button>
    <button type="button" title="Start from this picture" onClick=${() => startFromPicture(picture)}>As input</button>
    <button type="button" title="Put its settings into the form" onClick=${reuse}>Reuse settings</button>
    <${Copies} key=${picture.id} picture=${picture} />
    <a class="button" href=${addressOf(picture)} download=${fileName(picture)}>Download</a>
    <button type="button" class="danger" onClick=${() => remove(picture)}>Delete</button>
  </div>`;
}

async function startFromPicture({ blob }) {
  await startFrom(blob, { offer: false });
  document.getElementById("setting-prompt").focus();
}

function Parameters({ request, model, width, height, seed, infotext, seconds: took, at }) {
  const said = Object.fromEntries(
    [...infotext.split("\n").pop().matchAll(/(Steps|Sampler|Schedule type|CFG scale): ("[^"]*"|[^,]*)/g)].map(
      ([, name, value]) => [name, value],
    ),
  );
  const rows = {
    Model: model,
    Size: `${width} × ${height}`,
    Steps: said.Steps,
    Guidance: said["CFG scale"],
    Sampler: said.Sampler,
    Schedule: said["Schedule type"] === "Automatic" ? "" : said["Schedule type"],
    Seed: seed,
    LoRAs: [request.lora ?? []].flat().map(({ model_id, weight }) => `${model_id} ${weight}`).join(", "),
    ControlNet: [request.controlnet ?? []].flat().map(({ type }) => type).join(", "),
    Took: seconds(took),
    Made: new Date(at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }),
  };
  return html`<dl>
    ${Object.entries(rows)
      .filter(([, value]) => value)
      .map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}
  </dl>`;
}
