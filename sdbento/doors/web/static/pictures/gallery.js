// The pictures of all tabs of this browser, newest first, and which of them is shown.
import { lastSeed } from "../form/settings.js";
import { notify } from "../lib/notice.js";
import { store } from "../lib/store.js";
import * as database from "./database.js";

export const gallery = store({ pictures: [], shown: null, loaded: false });
const otherTabs = new BroadcastChannel("sdbento.pictures");
otherTabs.onmessage = () => load();

export async function load() {
  const pictures = await database.all().catch(() => []);
  pictures.sort((one, other) => other.id - one.id);
  if (pictures.length) lastSeed.set(pictures[0].seed);
  gallery.set(({ shown }) => ({ pictures, shown: shown ?? pictures[0]?.id ?? null, loaded: true }));
}

export async function keep(made) {
  let kept;
  try {
    kept = await database.add(made);
    otherTabs.postMessage("changed");
  } catch (error) {
    kept = made.map((picture, i) => ({ ...picture, id: Date.now() + i / 100 }));
    notify(`The browser does not keep these pictures: ${error.message}`);
  }
  const pictures = [...kept].reverse();
  gallery.set((before) => ({ ...before, pictures: [...pictures, ...before.pictures], shown: kept[0].id }));
}

export function show(id) {
  gallery.set((before) => ({ ...before, shown: id }));
}

export async function remove(picture) {
  gallery.set(({ pictures, shown, ...others }) => {
    const at = pictures.indexOf(picture);
    const rest = pictures.filter((one) => one !== picture);
    const next = shown === picture.id ? (rest[at] ?? rest[at - 1])?.id : shown;
    return { ...others, pictures: rest, shown: next ?? null };
  });
  await database.remove(picture.id);
  otherTabs.postMessage("changed");
  notify("Deleted.", { Undo: () => putBack(picture) });
}

async function putBack(picture) {
  await database.put(picture);
  otherTabs.postMessage("changed");
  await load();
  show(picture.id);
}

const addresses = new WeakMap();

// Where an <img> finds a picture.
export function addressOf({ blob }) {
  if (!addresses.has(blob)) addresses.set(blob, URL.createObjectURL(blob));
  return addresses.get(blob);
}

export function fileName({ model, seed, blob }) {
  const name = model.split("/").pop().replace(/[^\w.-]+/g, "-");
  return `${name}-${seed}.${blob.type.split("/")[1]}`;
}
