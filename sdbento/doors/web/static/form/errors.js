// What the server says of a field, beside that field.
import { html } from "../lib/html.js";
import { store, useStore } from "../lib/store.js";

const errors = store({}); // message by the parameter that it is about

export const clearErrors = () => errors.set({});

export function clearError(param) {
  if (param in errors.get()) errors.set(({ [param]: _, ...others }) => others);
}

// Whether the form has a place for it, which is then opened and focused. An error about
// `lora.0.weight` may stand beside all LoRAs.
export function placeError(param, message) {
  const parts = (param ?? "").split(".");
  for (; parts.length; parts.pop()) {
    const place = document.querySelector(`[data-param="${CSS.escape(parts.join("."))}"]`);
    if (!place) continue;
    errors.set((before) => ({ ...before, [parts.join(".")]: message }));
    for (let at = place; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    const control = place.querySelector("input, textarea, select, button") ?? place;
    control.focus({ preventScroll: true });
    control.scrollIntoView({ block: "center" });
    return true;
  }
  return false;
}

export function useError(param) {
  return useStore(errors)[param];
}

export function ErrorOf({ param }) {
  const message = useError(param);
  return message && html`<p class="error" id=${`error-${param}`}>${message}</p>`;
}

// Attributes of a control that name its error.
export function errorAttributes(param, message) {
  return message ? { "aria-invalid": "true", "aria-describedby": `error-${param}` } : {};
}
