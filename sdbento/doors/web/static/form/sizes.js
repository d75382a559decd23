// Sizes that suit a model: about as many pixels as it was trained with, in the usual shapes.
import { html } from "../lib/html.js";
import { useStore } from "../lib/store.js";
import { useEffect, useRef } from "../vendor/hooks.js";
import { change, settings } from "./settings.js";

const SHAPES = [
  ["Square", 1],
  ["Portrait", 2 / 3],
  ["Landscape", 3 / 2],
  ["Tall", 9 / 16],
  ["Wide", 16 / 9],
];

export function presets(model) {
  const grain = model.width >= 512 ? 64 : 8;
  const side = (length) => Math.max(grain, Math.floor(length / grain + 0.3) * grain);
  return SHAPES.map(([name, ratio]) => ({
    name,
    width: side(model.width * Math.sqrt(ratio)),
    height: side(model.height / Math.sqrt(ratio)),
  }));
}

// A preset that was chosen for another model becomes the one of the same shape.
function useSameShape(model) {
  const before = useRef(model);
  useEffect(() => {
    const { width, height } = settings.get();
    const chosen = presets(before.current).findIndex((one) => `${one.width} ${one.height}` === `${width} ${height}`);
    if (before.current.name !== model.name && chosen >= 0) {
      const { width, height } = presets(model)[chosen];
      change({ width: String(width), height: String(height) });
    }
    before.current = model;
  }, [model.name]);
}

export function Sizes({ model }) {
  useSameShape(model);
  const { width, height, image } = useStore(settings);
  const isOn = (preset) =>
    width === "" && height === ""
      ? !image && preset.name === "Square"
      : width === String(preset.width) && height === String(preset.height);
  const choose = (preset) =>
    isOn(preset) || (preset.name === "Square" && !image)
      ? change({ width: "", height: "" })
      : change({ width: String(preset.width), height: String(preset.height) });
  return html`<div class="sizes" role="group" aria-label="Size">
    ${presets(model).map(
      (preset) => html`<button
        type="button"
        class="size"
        aria-pressed=${String(isOn(preset))}
        title=${`${preset.width} × ${preset.height} pixels`}
        onClick=${() => choose(preset)}
      >
        <${Outline} ...${preset} /><span>${preset.name}</span>
        <small>${preset.width}×${preset.height}</small>
      </button>`,
    )}
  </div>`;
}

function Outline({ width, height }) {
  const scale = 18 / Math.max(width, height);
  const [w, h] = [width * scale, height * scale];
  return html`<svg viewBox="0 0 20 20" width="20" height="20" aria-hidden="true">
    <rect x=${10 - w / 2} y=${10 - h / 2} width=${w} height=${h} rx="2" />
  </svg>`;
}
