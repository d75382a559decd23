// The page: puts its parts together, and listens to what concerns all of it.
import { Form, submit } from "./form/form.js";
import { imageIn } from "./form/images/files.js";
import { restoreOr } from "./form/restore.js";
import { startFrom } from "./form/images/source.js";
import { Header } from "./header.js";
import { html } from "./lib/html.js";
import { Notice } from "./lib/notice.js";
import { cancelNewest, generations, progress } from "./pictures/generations.js";
import { load } from "./pictures/gallery.js";
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
    <${KeyDialog} />`;
}

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return; // it has keys of its own
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    submit();
  }
  if (event.key === "Escape") cancelNewest();
});
document.addEventListener("paste", (event) => {
  const file = imageIn(event.clipboardData);
  if (file) startFrom(file);
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault(); // else the browser would open the file
  const file = imageIn(event.dataTransfer);
  if (file) restoreOr(file, (one) => startFrom(one, { offer: false }));
});
generations.subscribe((all) => {
  const running = all.filter(({ error }) => !error);
  const share = running.reduce((sum, one) => sum + progress(one), 0) / running.length;
  document.title = running.length ? `${Math.round(100 * share)}% · sdbento` : "sdbento";
});

render(html`<${Page} />`, document.getElementById("page"));
load();
loadOffers();
