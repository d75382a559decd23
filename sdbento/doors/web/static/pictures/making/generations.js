// What is being made: each generation is one request, whose events change it until it is done.
import { notify } from "../../lib/notice.js";
import { store } from "../../lib/store.js";
import { call } from "../../server/calls.js";
import { events } from "../../server/events.js";
import { modelNamed } from "../../server/offers.js";
import { lastSeed } from "../../form/settings.js";
import { follow as followNext, keep } from "../gallery.js";
import { picturesOf } from "./made.js";
import { inTurn } from "./turns.js";

const PREVIEWS = 12; // of an image, about

// {id, request, controller, sent, position, eta, images: [{step, num_steps, preview}], error}, oldest first
export const generations = store([]);
export const announced = store(""); // what somebody who does not see the page is told
let count = 0;

function change(id, changes) {
  generations.set((all) => all.map((one) => (one.id === id ? { ...one, ...changes(one) } : one)));
}

const begun = (request) => ({ id: ++count, request, controller: new AbortController(), images: [] });

const forget = (id) => generations.set((all) => all.filter((one) => one.id !== id));

// `place`: told of an error, says whether it stands elsewhere, so that no card is needed for it
export async function generate(request, place = () => false) {
  const generation = begun(request);
  generations.set((all) => [...all, generation]);
  followNext();
  try {
    await inTurn(generation.controller.signal, () => follow(generation));
    forget(generation.id);
  } catch (error) {
    if (generation.controller.signal.aborted) return;
    if (place(error)) return forget(generation.id);
    change(generation.id, () => ({ error }));
  }
}

// A generation that has not come to its end, for a reason that only the page knows.
export function fail(request, message) {
  generations.set((all) => [...all, { ...begun(request), error: new Error(message) }]);
}

async function follow({ id, request, controller }) {
  const steps = request.num_inference_steps ?? modelNamed(request.model)?.num_inference_steps ?? PREVIEWS;
  const body = { ...request, preview_every: Math.max(1, Math.ceil(steps / PREVIEWS)) };
  change(id, () => ({ sent: true }));
  const response = await call("generate_stream", { body, signal: controller.signal });
  for await (const event of events(response)) {
    if (event.event === "error") throw Object.assign(new Error(event.error.message), event.error);
    if (event.event === "done") return await finish(request, event.response);
    change(id, (now) => noted(now, event));
  }
  throw new Error("The connection ended before the picture was done.");
}

function noted(now, event) {
  if (event.event === "queued") return { position: event.position, eta: event.eta };
  const images = [...now.images];
  const { step, num_steps } = event;
  images[event.image] = { ...images[event.image], step, num_steps };
  if (event.preview) images[event.image].preview = `data:image/jpeg;base64,${event.preview}`;
  return { images, eta: event.eta ?? now.eta };
}

async function finish(request, response) {
  const made = await picturesOf(request, response);
  lastSeed.set(made[0].seed);
  await keep(made);
  announced.set(`Made: ${request.prompt || "untitled"}, seed ${made[0].seed}`);
  for (const warning of response.warnings) notify(warning);
}

export function cancel({ id, controller, request }) {
  controller.abort();
  forget(id);
  notify("Cancelled.", { "Start again": () => generate(request) });
}

export function cancelNewest() {
  const newest = generations.get().findLast(({ error }) => !error);
  if (newest) cancel(newest);
  return Boolean(newest);
}

// Share of all steps of all images that are done.
export function progress({ images, request }) {
  const number = request.num_images ?? 1;
  const shares = images.filter(Boolean).map(({ step, num_steps }) => step / num_steps);
  return shares.reduce((sum, share) => sum + share, 0) / number;
}

export const dismiss = ({ id }) => forget(id);
