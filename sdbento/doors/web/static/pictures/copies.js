// A request as text, for those who would rather send it by a program.
import { html } from "../lib/html.js";
import { notify } from "../lib/notice.js";
import { key } from "../server/key.js";
import { useRef } from "../vendor/hooks.js";
import { asCurl, asOpenAI, asPython, asRunPod } from "./programs.js";
import { requestOf } from "./stored.js";

const WAYS = { curl: asCurl, Python: asPython, OpenAI: asOpenAI, "RunPod JSON": asRunPod };

export function Copies({ picture }) {
  const request = useRef(null); // read when the menu opens: browsers let a page copy only right after a click
  const onToggle = async ({ target }) => {
    if (target.open) request.current = await requestOf(picture);
  };
  const copy = async (name) => {
    request.current ??= await requestOf(picture);
    await copyText(WAYS[name](request.current, base(), key.get() ? "KEY" : null));
    notify(`Copied as ${name}.`);
  };
  const choose = (event, name) => {
    event.target.closest("details").open = false;
    copy(name).catch(() => notify("The browser does not let this page copy."));
  };
  const onKeyDown = (event) => {
    if (event.key !== "Escape" || !event.currentTarget.open) return;
    event.stopPropagation(); // it would cancel what is being made
    event.currentTarget.open = false;
    event.currentTarget.firstElementChild.focus();
  };
  const onFocusOut = (event) => {
    if (!event.currentTarget.contains(event.relatedTarget)) event.currentTarget.open = false;
  };
  return html`<details class="menu" ...${{ onToggle, onKeyDown, onFocusOut }}>
    <summary class="button">Copy as</summary>
    <div class="choices">
      ${Object.keys(WAYS).map((name) => html`<button type="button" onClick=${(event) => choose(event, name)}>${name}</button>`)}
    </div>
  </details>`;
}

// Browsers have a clipboard only for pages that came by https, or from this machine.
async function copyText(text) {
  if (navigator.clipboard) return await navigator.clipboard.writeText(text);
  const area = Object.assign(document.createElement("textarea"), { value: text, className: "unseen" });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("not copied");
}

const base = () => new URL(".", document.baseURI).href.replace(/\/$/, "");
