// Settings of the form to the request that the server takes, and back.
import { EMPTY } from "./settings.js";

const TEXTS = ["negative_prompt", "model", "scheduler", "sigmas"];
const NUMBERS = ["width", "height", "num_inference_steps", "guidance_scale", "num_images", "clip_skip"];
const SIDES = ["left", "right", "top", "bottom"];
// Of a mask that is painted here: with any, what was not painted over stays as it was.
export const MASK_BLUR = 4;
const NOT_SETTINGS = ["preview_every", "timeout", "output_compression"];

const number = (text) => (text === "" ? undefined : Number(text));
const text = (value) => (value === undefined || value === null ? "" : String(value));

// Without what is undefined.
function only(fields) {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined));
}

export function toRequest(settings) {
  const fields = { ...settings.others, prompt: settings.prompt };
  for (const name of TEXTS) fields[name] = settings[name] || undefined;
  for (const name of NUMBERS) fields[name] = number(settings[name]);
  fields.seed = settings.seed || undefined;
  fields.output_format = settings.output_format === "png" ? undefined : settings.output_format;
  if (settings.image) Object.assign(fields, imageFields(settings));
  if (settings.loras.length) fields.lora = settings.loras;
  if (settings.controlnet.length) fields.controlnet = settings.controlnet.map(only);
  return only({ ...fields, ...passes(settings) });
}

function imageFields(settings) {
  const fields = { image: settings.image.data };
  if (settings.use === "enlarge") {
    const { enlarge_scale: scale, enlarge_strength: strength } = settings;
    return { ...fields, upscale: { scale: number(scale), strength: number(strength) } };
  }
  fields.strength = number(settings.strength);
  fields.resize_mode = settings.resize_mode === "stretch" ? undefined : settings.resize_mode;
  if (settings.use === "change") return fields;
  fields.mask_blur = number(settings.mask_blur) ?? (settings.use === "repaint" ? MASK_BLUR : undefined);
  fields.padding_mask_crop = number(settings.padding_mask_crop);
  if (settings.use === "repaint") return { ...fields, mask_image: settings.mask_image ?? undefined };
  const margins = SIDES.map((side) => [side, number(settings[side])]);
  return { ...fields, outpaint: only(Object.fromEntries(margins)) };
}

function passes(settings) {
  const hires = {
    scale: number(settings.hires_scale),
    strength: number(settings.hires_strength),
    steps: number(settings.hires_steps),
    upscaler: settings.hires_upscaler,
  };
  const refiner = { model: settings.refiner_model || undefined, switch_at: number(settings.switch_at) };
  return {
    hires: settings.hires ? only(hires) : undefined,
    refiner: settings.refiner ? only(refiner) : undefined,
  };
}

// The settings that make a request. Its images are there only if it has them itself, not digests.
export async function fromRequest(request, measure) {
  const settings = { prompt: request.prompt ?? "", seed: text(request.seed) };
  const rest = { ...request };
  const take = (name) => {
    const value = rest[name] ?? undefined;
    delete rest[name];
    return value;
  };
  for (const name of ["prompt", "seed", ...NOT_SETTINGS]) delete rest[name];
  for (const name of [...TEXTS, ...NUMBERS]) settings[name] = text(take(name));
  settings.output_format = take("output_format") ?? "png";
  settings.loras = [take("lora") ?? []].flat().map((lora) => ({ weight: 1, ...lora }));
  settings.controlnet = [take("controlnet") ?? []].flat().filter((one) => one?.image === undefined || isInline(one.image));
  Object.assign(settings, await imageSettings(take, measure), passSettings(take));
  return { ...settings, others: rest };
}

// Whether the request has the image itself: no digest of it, and no address.
export const isInline = (image) => typeof image === "string" && (image.startsWith("data:image/") || !image.includes(":"));

async function imageSettings(take, measure) {
  const [data, mask_image, outpaint, upscale] = ["image", "mask_image", "outpaint", "upscale"].map(take);
  const settings = { resize_mode: take("resize_mode") ?? EMPTY.resize_mode };
  for (const name of ["strength", "mask_blur", "padding_mask_crop"]) settings[name] = text(take(name));
  settings.image = isInline(data) ? await measure(data) : null;
  if (!settings.image) return settings;
  if (isInline(mask_image)) Object.assign(settings, { use: "repaint", mask_image, mask_blur: settings.mask_blur || "0" });
  if (outpaint) {
    settings.use = "extend";
    for (const side of SIDES) settings[side] = text(outpaint[side]);
  }
  if (upscale) {
    const { scale, strength } = upscale;
    Object.assign(settings, { use: "enlarge", enlarge_scale: text(scale), enlarge_strength: text(strength) });
  }
  return settings;
}

function passSettings(take) {
  const settings = {};
  const [hires, refiner] = ["hires", "refiner"].map(take);
  if (hires) {
    settings.hires = true;
    for (const [name, value] of Object.entries(hires)) settings[`hires_${name}`] = text(value);
  }
  if (refiner) {
    settings.refiner = true;
    settings.refiner_model = text(refiner.model);
    if (refiner.switch_at !== undefined) settings.switch_at = text(refiner.switch_at);
  }
  return settings;
}
