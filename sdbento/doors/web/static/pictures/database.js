// The pictures that were made here, kept in this browser (IndexedDB). Each is
// {id, at, blob, request, seed, model, parameters, width, height, seconds, warnings}.
const STORE = "pictures";
let opened = null;

function open() {
  opened ??= settled(indexedDB.open("sdbento", 1), (request) => {
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
  });
  return opened;
}

function settled(request, prepare = () => {}) {
  return new Promise((resolve, reject) => {
    prepare(request);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function pictures(mode) {
  return (await open()).transaction(STORE, mode).objectStore(STORE);
}

export async function all() {
  return await settled((await pictures("readonly")).getAll());
}

// The pictures with the ids that they have from now on.
export async function add(made) {
  const store = await pictures("readwrite");
  const ids = await Promise.all(made.map((picture) => settled(store.add(picture))));
  return made.map((picture, i) => ({ ...picture, id: ids[i] }));
}

export async function put(picture) {
  await settled((await pictures("readwrite")).put(picture));
}

export async function remove(id) {
  await settled((await pictures("readwrite")).delete(id));
}
