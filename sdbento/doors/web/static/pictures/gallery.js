// The pictures of all tabs of this browser, newest first, and which of them is shown.
import { lastSeed } from "../form/settings.js";
import { confirmed } from "../lib/confirm.js";
import { notify } from "../lib/notice.js";
import { store } from "../lib/store.js";
import * as database from "./database.js";

// `follows`: the next picture that is made will be shown. `isKept` of a picture: it is in the database.
export const gallery = store({ pictures: [], shown: null, follows: true, loaded: false });
const otherTabs = new BroadcastChannel("sdbento.pictures");
otherTabs.onmessage = () => load();
const tell = () => otherTabs.postMessage("changed");
let unkept = 0; // their ids are negative

// By their ids, not their times: clocks are set back.
const newestFirst = (pictures) =>
  pictures.sort((one, other) => one.isKept - other.isKept || Math.abs(other.id) - Math.abs(one.id));

export async function load() {
  const kept = await database.all().catch(() => []);
  gallery.set(({ pictures, shown, follows }) => {
    const known = new Map(pictures.map((picture) => [picture.id, picture])); // whose images are here already
    const all = kept.map((picture) => known.get(picture.id) ?? { ...picture, isKept: true });
    const others = pictures.filter(({ isKept }) => !isKept);
    const next = newestFirst([...all, ...others]);
    return { pictures: next, shown: shown ?? next[0]?.id ?? null, follows, loaded: true };
  });
  const [newest] = gallery.get().pictures;
  if (newest) lastSeed.set(newest.seed);
}

export async function keep(made) {
  const added = await addOrHold(made);
  const ids = new Set(added.map(({ id }) => id)); // which another tab's message may have made known already
  gallery.set((before) => ({
    ...before,
    pictures: [...[...added].reverse(), ...before.pictures.filter(({ id }) => !ids.has(id))],
    shown: before.follows ? added[0].id : before.shown,
  }));
}

async function addOrHold(made) {
  try {
    const kept = await database.add(made);
    tell();
    return kept.map((picture) => ({ ...picture, isKept: true }));
  } catch (error) {
    const why = error?.name === "QuotaExceededError" ? "its storage is full" : error?.message;
    notify(`The browser does not keep pictures: ${why}. They are gone when this page is closed.`);
    return made.map((picture) => ({ ...picture, id: -(unkept += 1), isKept: false }));
  }
}

// What is looked at stays, whatever is made meanwhile.
export function show(id) {
  gallery.set((before) => ({ ...before, shown: id, follows: false }));
}

export const follow = () => gallery.set((before) => ({ ...before, follows: true }));

export async function remove(picture) {
  gallery.set(({ pictures, shown, ...others }) => {
    const at = pictures.indexOf(picture);
    const rest = pictures.filter((one) => one !== picture);
    const next = shown === picture.id ? (rest[at] ?? rest[at - 1])?.id : shown;
    return { ...others, pictures: rest, shown: next ?? null };
  });
  notify("Deleted.", { Undo: () => putBack(picture) });
  if (picture.isKept) await changed(database.remove(picture.id));
}

async function putBack(picture) {
  if (picture.isKept) await changed(database.put(picture));
  gallery.set((before) => ({ ...before, pictures: newestFirst([picture, ...before.pictures]) }));
  show(picture.id);
}

export async function removeAll() {
  const { pictures } = gallery.get();
  const text = `All ${pictures.length} pictures in this browser will be gone for good.`;
  if (!(await confirmed(text, "Delete all", "Keep them"))) return;
  gallery.set((before) => ({ ...before, pictures: [], shown: null }));
  if (pictures.some(({ isKept }) => isKept)) await changed(database.clear());
}

// A change of the database that other tabs have to know of.
async function changed(change) {
  try {
    await change;
    tell();
  } catch (error) {
    notify(`The browser could not change what it keeps: ${error?.message}`);
  }
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
