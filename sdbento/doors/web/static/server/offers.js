// What this server has: models, samplers, LoRAs, ways to make control images.
import { store } from "../lib/store.js";
import { json } from "./calls.js";

export const offers = store({ models: [], samplers: [], loras: [], modules: [], error: null });

export async function loadOffers() {
  try {
    const [{ models }, { samplers }, loras, { module_list }] = await Promise.all(
      ["models", "samplers", "sdapi/v1/loras", "controlnet/module_list"].map((path) => json(path)),
    );
    const modules = module_list.filter((name) => name !== "none");
    offers.set({ models, samplers, loras: loras.map(toLora), modules, error: null });
  } catch (error) {
    offers.set((before) => ({ ...before, error: error.message }));
  }
}

// `model` is the only one that a LoRA fits; undefined: not known.
function toLora({ name, metadata }) {
  return { name, model: metadata.ss_sd_model_name };
}

export function modelNamed(name, { models } = offers.get()) {
  return models.find((model) => (name ? model.name === name : model.default)) ?? models[0];
}

export function samplerNamed(name, { samplers } = offers.get()) {
  return samplers.find((one) => one.name === name || one.aliases.includes(name));
}
