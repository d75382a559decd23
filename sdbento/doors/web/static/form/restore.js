// Settings out of an image file: ours, or AUTOMATIC1111's infotext. The server reads the file.
import { decode } from "../lib/numbers.js";
import { notify } from "../lib/notice.js";
import { json } from "../server/calls.js";
import { modelNamed, offers, samplerNamed } from "../server/offers.js";
import { asDataUri, measure } from "./images/files.js";
import { fromRequest, isInline } from "./request.js";
import { replace } from "./settings.js";

// What the file says of how it was made, as a request, and what of it this server does not have.
async function requestIn(file) {
  const image = await asDataUri(file);
  const { items, parameters, info } = await json("sdapi/v1/png-info", { body: { image } });
  if (items.sdbento) return [decode(items.sdbento), []];
  return info && parameters.Steps ? fromInfotext(parameters) : [null, []];
}

// A file that was dropped on the page: restore its settings, or else start from it.
export async function restoreOr(file, otherwise) {
  const [request, lost] = await requestIn(file).catch(() => [null]);
  if (!request) return otherwise(file);
  await restore(request, lost, { "Start from it": () => otherwise(file) });
}

// A file that a request will start from: it may have settings, too.
export async function offerSettings(file) {
  const [request, lost] = await requestIn(file).catch(() => [null]);
  if (request) notify("This image says how it was made.", { "Restore its settings": () => restore(request, lost) });
}

export async function restore(request, lost = [], actions = {}) {
  const undo = replace(await fromRequest(request, measure));
  document.getElementById("setting-prompt").scrollIntoView({ block: "center" });
  const isLost = [request.image, request.mask_image].some((image) => image && !isInline(image));
  const all = isLost ? ["the image that it started from", ...lost] : lost;
  notify(all.length ? `Settings restored, except ${all.join(" and ")}.` : "Settings restored.", { ...actions, Undo: undo });
}

const SCHEDULES = ["karras", "exponential", "beta"];
const WITH_SCHEDULE = /^(.+) (karras|exponential)$/i; // how the web UI called samplers before version 1.9

function fromInfotext(said) {
  const number = (name) => (said[name] === undefined ? undefined : Number(said[name]));
  const [, name = said.Sampler, schedule = said["Schedule type"]] = WITH_SCHEDULE.exec(said.Sampler) ?? [];
  const sampler = samplerNamed(name)?.name;
  const sigmas = schedule?.toLowerCase();
  const model = offers.get().models.find(({ name }) => name === said.Model)?.name;
  const strength = number("Denoising strength");
  const request = {
    prompt: said.Prompt,
    negative_prompt: said["Negative prompt"] || undefined,
    model,
    num_inference_steps: number("Steps"),
    guidance_scale: number("CFG scale"),
    scheduler: sampler,
    sigmas: sampler && SCHEDULES.includes(sigmas) ? sigmas : undefined,
    seed: said.Seed,
    width: number("Size-1"),
    height: number("Size-2"),
    clip_skip: number("Clip skip") > 1 ? number("Clip skip") - 1 : undefined,
  };
  if (said["Hires upscale"]) request.hires = hires(said, number, strength);
  else request.strength = strength;
  if (said.Refiner && modelNamed(said.Refiner)?.refines) {
    request.refiner = { model: said.Refiner, switch_at: number("Refiner switch at") };
  }
  const lost = [said.Sampler && !sampler && `the sampler ${said.Sampler}`, said.Model && !model && `the model ${said.Model}`];
  return [request, lost.filter(Boolean)];
}

// Its hires steps are those that are done; ours are cut by the strength.
function hires(said, number, strength = 0.6) {
  const done = number("Hires steps");
  const steps = done ? Math.round(done / strength) : undefined;
  const upscaler = said["Hires upscaler"]?.toLowerCase();
  const known = ["lanczos", "bicubic", "nearest", "latent"].includes(upscaler);
  return { scale: number("Hires upscale"), strength, steps, ...(known ? { upscaler } : {}) };
}
