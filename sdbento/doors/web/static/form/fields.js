// Controls with a label, a setting and a place for the server's errors.
import { html } from "../lib/html.js";
import { ErrorOf, clearError, errorAttributes, useError } from "./errors.js";
import { useSetting } from "./settings.js";

// `param`: what the server calls the field, where that is not the setting's own name
function useField(name, param = name) {
  const [value, set] = useSetting(name);
  const invalid = errorAttributes(param, useError(param));
  const onInput = (event) => {
    clearError(param);
    set(event.target.value);
  };
  return { value, invalid, onInput, id: `setting-${name}`, param };
}

function Labelled({ id, label, param, class: kind, children }) {
  return html`<div class=${`field ${kind ?? ""}`} data-param=${param}>
    <label for=${id}>${label}</label>${children}<${ErrorOf} param=${param} />
  </div>`;
}

export function TextArea({ name, label, rows, placeholder }) {
  const { id, param, invalid, ...control } = useField(name);
  return html`<${Labelled} ...${{ id, label, param }}>
    <textarea id=${id} dir="auto" rows=${rows} placeholder=${placeholder} ...${control} ...${invalid}></textarea>
  <//>`;
}

export function NumberField({ name, label, placeholder, min, max, step = 1, param: told }) {
  const { id, param, invalid, ...control } = useField(name, told);
  const limits = { min, max, step, placeholder };
  return html`<${Labelled} ...${{ id, label, param }}>
    <input id=${id} type="number" inputmode="decimal" ...${limits} ...${control} ...${invalid} />
  <//>`;
}

// `options`: [value, label]
export function Select({ name, label, options, param: told }) {
  const { id, param, invalid, value, onInput } = useField(name, told);
  const known = options.some(([one]) => one === value);
  const all = known ? options : [...options, [value, value]];
  return html`<${Labelled} ...${{ id, label, param }}>
    <select id=${id} onChange=${onInput} ...${invalid}>
      ${all.map(([one, text]) => html`<option value=${one} selected=${one === value}>${text}</option>`)}
    </select>
  <//>`;
}

export function Range({ name, label, min, max, step, otherwise, param: told }) {
  const { id, param, invalid, value, onInput } = useField(name, told);
  return html`<${Labelled} ...${{ id, label, param }} class="range">
    <${Slider} ...${{ id, min, max, step, invalid }} value=${value === "" ? otherwise : value} onInput=${onInput} />
  <//>`;
}

export function Slider({ id, invalid, ...attributes }) {
  return html`<span class="slider">
    <input type="range" id=${id} ...${attributes} ...${invalid} />
    <span class="value" aria-hidden="true">${Number(attributes.value).toFixed(2).replace(/0$/, "")}</span>
  </span>`;
}

export function Check({ name, label }) {
  const [value, set] = useSetting(name);
  return html`<label class="check">
    <input type="checkbox" checked=${value} onChange=${(event) => set(event.target.checked)} /> ${label}
  </label>`;
}

// A part of the form that is folded away; `summary` says what is set in it.
export function Folded({ title, summary, open, children }) {
  return html`<details open=${open}>
    <summary><span>${title}</span>${summary && html`<span class="hint">${summary}</span>`}</summary>
    <div class="folded">${children}</div>
  </details>`;
}
