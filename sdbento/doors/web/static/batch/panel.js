// The view of what the server computes at this moment, and for whom.
import { html } from "../lib/html.js";
import { seconds } from "../lib/numbers.js";
import { useEffect, useState } from "../vendor/hooks.js";
import { hue, Lane } from "./lane.js";
import { Table } from "./table.js";
import { watch } from "./watch.js";
import { count, howMade, milliseconds, nameOf, until } from "./words.js";

export function Batch() {
  const [batch, setBatch] = useState(null);
  const [problem, setProblem] = useState(null);
  useEffect(() => watch(setBatch, setProblem), []);
  return html`<div class="batch">
    ${problem && html`<p class="error" role="alert">${problem.message}</p>`}
    ${batch ? html`<${Shown} batch=${batch} />` : !problem && html`<p class="hint">Asking the server …</p>`}
  </div>`;
}

function Shown({ batch }) {
  const requests = new Map(batch.requests.map((request) => [request.number, request]));
  const waiting = batch.requests.filter(({ num_waiting }) => num_waiting);
  const isIdle = !batch.queue.requests && !batch.queue.preparing;
  return html`
    <${Figures} batch=${batch} />
    ${isIdle && html`<p class="hint">Nothing runs. Generate something, here or from any other client, and watch it join.</p>`}
    <div class="lanes" aria-hidden="true">
      ${batch.lanes.map((lane) => html`<${Lane} key=${keyOf(lane)} lane=${lane} left=${batch.left} requests=${requests} />`)}
    </div>
    <div class="unseen"><${Table} batch=${batch} requests=${requests} /></div>
    ${waiting.length > 0 && html`<${Waiting} requests=${waiting} more=${batch.queue.requests - batch.requests.length} />`}
    <${Memory} models=${batch.models} />`;
}

function Figures({ batch: { recent, queue, lanes } }) {
  const inBatch = lanes.flatMap(({ images }) => images).filter(({ rows }) => rows).length;
  const figures = [
    ["In the batch", count(inBatch, "image")],
    ["Waiting", count(queue.waiting, "image")],
    ["A call", recent ? `${milliseconds(recent.seconds)}, ${recent.rows.toFixed(1)} rows` : "none of late"],
    ["All done in", queue.requests && queue.eta !== null ? seconds(queue.eta) : "–"],
  ];
  if (queue.preparing) figures.push(["Being prepared", count(queue.preparing, "request")]);
  return html`<dl class="figures">
    ${figures.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}
  </dl>`;
}

function Waiting({ requests, more }) {
  return html`<section class="waiting">
    <h3>Waiting</h3>
    <ul>
      ${requests.map(
        (request) => html`<li key=${request.number} style=${{ "--hue": hue(request.number) }}>
          <span class="whose" dir="auto">${nameOf(request)}</span>
          <span class="how hint">${howMade(request)}</span>
          <span>${count(request.num_waiting, "image")}</span>
          <span class="hint">${until(request.eta)}</span>
        </li>`,
      )}
    </ul>
    ${more > 0 && html`<p class="hint">and ${count(more, "request")} more</p>`}
  </section>`;
}

function Memory({ models }) {
  const names = models.map(({ name, memory_gb }) => `${name ?? "another's"} (${memory_gb.toFixed(2)} GB)`);
  return html`<p class="hint">In memory: ${names.join(", ") || "no model"}</p>`;
}

function keyOf({ device, model, width, height, text_chunks, token_merging_ratio }) {
  return [device, model, width, height, text_chunks, token_merging_ratio].join();
}
