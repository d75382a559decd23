// A value that components show and anybody may change.
import { useLayoutEffect, useReducer } from "../vendor/hooks.js";

export function store(value) {
  const listeners = new Set();
  return {
    get: () => value,
    set(next) {
      value = typeof next === "function" ? next(value) : next;
      for (const listener of [...listeners]) listener(value);
    },
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

export function useStore(source) {
  const [, draw] = useReducer((times) => times + 1, 0);
  useLayoutEffect(() => source.subscribe(draw), [source]);
  return source.get();
}

// What is kept in the browser. A full or forbidden storage is no reason to fail.
export const kept = {
  read(name, otherwise) {
    try {
      return JSON.parse(localStorage.getItem(`sdbento.${name}`)) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  write(name, value) {
    try {
      localStorage.setItem(`sdbento.${name}`, JSON.stringify(value));
    } catch {
      // the page works without it until it is closed
    }
  },
};
