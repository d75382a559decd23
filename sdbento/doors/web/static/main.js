// The page: puts its parts together, and listens to what concerns all of it.
import { takeDrops, takePastes } from "./drop.js";
import { keepImages } from "./form/draft.js";
import { Form, submit } from "./form/form.js";
import { Header } from "./header.js";
import { Confirmation } from "./lib/confirm.js";
import { html } from "./lib/html.js";
import { Notice } from "./lib/notice.js";
import { cancelNewest, generations, progress } from "./pictures/making/generations.js";
import { load } from "./pictures/gallery.js";
import { watchOver } from "./pictures/making/unfinished.js";
import { KeyDialog } from "./server/key.js";
import { loadOffers } from "./server/offers.js";
import { Tabs } from "./tabs.js";
import { render } from "./vendor/preact.js";

function Page() {
  return html`<${Header} />
    <main>
      <${Form} />
      <${Tabs} />
    </main>
    <${Notice} />
    <${KeyDialog} />
    <${Confirmation} />`;
}

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return; // it has keys of its own
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (!event.repeat) submit();
  }
  if (event.key === "Escape" && !event.isComposing) cancelNewest();
});
generations.subscribe((all) => {
  const running = all.filter(({ error }) => !error);
  const share = running.reduce((sum, one) => sum + progress(one), 0) / running.length;
  document.title = running.length ? `${Math.round(100 * share)}% · sdbento` : "sdbento";
});

const place = document.getElementById("page");
place.replaceChildren(); // what was there while this was loading
render(html`<${Page} />`, place);
takeDrops();
takePastes();
load();
keepImages();
loadOffers();
watchOver();
