// IndexedDB, whose requests are no promises.

// A database with one store, made if it is missing.
export function opened(name, store, options) {
  const request = indexedDB.open(name, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(store, options);
  return settled(request);
}

export function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
