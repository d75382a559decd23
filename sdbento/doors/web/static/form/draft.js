// The images of the form over a reload, in a database of their own: they are too large for where its settings are kept.
import { opened, settled } from "../lib/database.js";
import { measure } from "./images/files.js";
import { change, settings } from "./settings.js";

const STORE = "images";
const PAUSE = 300; // milliseconds without a change before they are written
let timer = 0;
let known = {};
let database = null;

async function images(mode) {
  database ??= opened("sdbento.form", STORE);
  return (await database).transaction(STORE, mode).objectStore(STORE);
}

const imagesOf = ({ image, mask_image, controlnet }) => ({ image: image?.data, mask_image, controlnet });

const differ = (one, other) => Object.keys(one).some((name) => one[name] !== other[name]);

export async function keepImages() {
  await restoreImages().catch(() => {}); // the browser keeps nothing
  known = imagesOf(settings.get());
  settings.subscribe((now) => {
    if (!differ(imagesOf(now), known)) return;
    known = imagesOf(now);
    clearTimeout(timer);
    timer = setTimeout(() => write(known).catch(() => {}), PAUSE);
  });
}

async function restoreImages() {
  const kept = await settled((await images("readonly")).get(STORE));
  const image = kept?.image ? await measure(kept.image) : null;
  const now = settings.get();
  if (!kept || now.image || now.controlnet.length) return; // the user was quicker
  change({ image, mask_image: image && kept.mask_image, controlnet: kept.controlnet });
}

async function write(next) {
  await settled((await images("readwrite")).put(next, STORE));
}
