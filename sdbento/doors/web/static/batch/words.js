// How the batch is put into words.
import { seconds } from "../lib/numbers.js";

export function count(number, what) {
  return `${number} ${what}${number === 1 ? "" : "s"}`;
}

export function milliseconds(value) {
  return `${Math.round(1000 * value)} ms`;
}

export function nameOf(request) {
  return request?.yours ? request.prompt || "no prompt" : "another's";
}

export function howMade(request) {
  if (!request) return "";
  const { sampler, loras, num_loras, num_controlnets } = request;
  const parts = [sampler];
  if (num_loras) parts.push(loras.length ? `LoRA ${loras.join(", ")}` : count(num_loras, "LoRA"));
  if (num_controlnets) parts.push(count(num_controlnets, "ControlNet"));
  return parts.filter(Boolean).join(" + ");
}

export function laneName({ model, width, height, device }) {
  const on = device === null ? "" : `, device ${device}`;
  return `${model ?? "another model"}, ${width} × ${height}${on}`;
}

export function stateOf(image) {
  if (image.step >= image.num_steps) return "decoding";
  if (image.rows) return "";
  return image.step ? "paused" : "begins";
}

export function until(eta) {
  return eta === null || eta === undefined ? "" : `done in ${seconds(eta)}`;
}
