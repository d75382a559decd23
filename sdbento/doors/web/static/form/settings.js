// What the form holds. Numbers are text, as their fields have them; "" leaves them to the model.
import { kept, store, useStore } from "../lib/store.js";

export const EMPTY = {
  prompt: "",
  negative_prompt: "",
  model: "",
  width: "",
  height: "",
  num_inference_steps: "",
  guidance_scale: "",
  scheduler: "",
  sigmas: "",
  seed: "",
  num_images: "",
  clip_skip: "",
  output_format: "png",
  image: null, // {data, width, height}: what to start from
  use: "change", // or repaint, extend, enlarge
  strength: "",
  mask_image: null,
  mask_blur: "",
  padding_mask_crop: "",
  resize_mode: "stretch",
  left: "",
  right: "",
  top: "",
  bottom: "",
  enlarge_scale: "2",
  enlarge_strength: "0.35",
  loras: [], // {model_id, weight}
  controlnet: [], // {type, image, preprocess, conditioning_scale, guidance_start, guidance_end}
  hires: false,
  hires_scale: "2",
  hires_strength: "0.6",
  hires_steps: "",
  hires_upscaler: "lanczos",
  refiner: false,
  refiner_model: "",
  switch_at: "0.8",
  others: {}, // fields of a restored request that the form has no place for
};
const isText = (value) => typeof value === "string";
const KINDS = {
  image: (value) => isText(value?.data),
  mask_image: isText,
  loras: Array.isArray,
  controlnet: Array.isArray,
};
const IMAGES = ["image", "mask_image", "controlnet"]; // too large to be kept here

export const settings = store(sound(kept.read("settings", {})));
settings.subscribe((value) => {
  const small = Object.entries(value).filter(([name]) => !IMAGES.includes(name));
  kept.write("settings", Object.fromEntries(small));
});

// All settings, those of `given` where they are of the right kind: they come out of files that anybody may have made.
function sound(given) {
  const isSound = ([name, value]) => (name in KINDS ? KINDS[name](value) : typeof value === typeof EMPTY[name]);
  const next = { ...EMPTY, ...Object.fromEntries(Object.entries(given).filter(isSound)) };
  next.loras = next.loras.filter((one) => isText(one?.model_id) && Number.isFinite(one.weight));
  next.controlnet = next.controlnet.filter((one) => isText(one?.type));
  return next;
}

export function change(changes) {
  settings.set((before) => ({ ...before, ...changes }));
}

export function useSetting(name) {
  return [useStore(settings)[name], (value) => change({ [name]: value })];
}

// Settings that were replaced as a whole can be had back.
export function replace(next) {
  const before = settings.get();
  settings.set(sound(next));
  return () => settings.set(before);
}

export const lastSeed = store("");
