// The pictures that were made here, kept in this browser (IndexedDB). Each is
// {id, at, blob, request, images, seed, model, infotext, width, height, seconds, warnings}.
import { opened, settled } from "../lib/database.js";

const STORE = "pictures";
let database = null;

function open() {
  database ??= opened("sdbento", STORE, { keyPath: "id", autoIncrement: true });
  return database;
}

// What `work` returns, once it is on the disk: a full disk is noticed only then.
async function written(work) {
  const transaction = (await open()).transaction(STORE, "readwrite");
  const done = new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error);
  });
  const [result] = await Promise.all([work(transaction.objectStore(STORE)), done]);
  return result;
}

export async function all() {
  return await settled((await open()).transaction(STORE).objectStore(STORE).getAll());
}

// The pictures with the ids that they have from now on.
export async function add(made) {
  const ids = await written((store) => Promise.all(made.map((picture) => settled(store.add(picture)))));
  return made.map((picture, i) => ({ ...picture, id: ids[i] }));
}

export async function put(picture) {
  await written((store) => settled(store.put(picture)));
}

export async function remove(id) {
  await written((store) => settled(store.delete(id)));
}

export async function clear() {
  await written((store) => settled(store.clear()));
}
