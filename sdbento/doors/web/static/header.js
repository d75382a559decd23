// The head of the page: its name, the reference, the key, the colours.
import { html } from "./lib/html.js";
import { Icon } from "./lib/icons.js";
import { kept } from "./lib/store.js";
import { askForKey } from "./server/key.js";
import { loadOffers } from "./server/offers.js";
import { useState } from "./vendor/hooks.js";

const ICON = new URL("icon.svg", import.meta.url).href;
const NEXT = { auto: "light", light: "dark", dark: "auto" };
const MESSAGE = "If this server needs a key, enter yours.";

export function Header() {
  const [theme, setTheme] = useState(document.documentElement.dataset.theme);
  const turn = () => {
    const next = NEXT[theme] ?? "auto";
    document.documentElement.dataset.theme = next;
    kept.write("theme", next);
    setTheme(next);
  };
  const enterKey = async () => (await askForKey(MESSAGE)) && loadOffers();
  return html`<header class="head">
    <h1><img src=${ICON} alt="" width="26" height="26" /> sdbento</h1>
    <nav aria-label="More"><a href="docs">API</a></nav>
    <button type="button" class="icon" aria-label="Set the key" title="Set the key" onClick=${enterKey}><${Icon} name="key" /></button>
    <button type="button" class="icon" aria-label=${`Colours: ${theme}`} title=${`Colours: ${theme}`} onClick=${turn}>
      <${Icon} name=${theme} />
    </button>
  </header>`;
}
