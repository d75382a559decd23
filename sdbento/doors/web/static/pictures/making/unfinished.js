// What is being made when the page is left: the user is asked first, and can have it made again afterwards.
import { decode, encode } from "../../lib/numbers.js";
import { fail, generations } from "./generations.js";
import { leave } from "./turns.js";

const NAME = "sdbento.unfinished";

const running = () => generations.get().filter(({ error }) => !error);

export function watchOver() {
  addEventListener("beforeunload", (event) => running().length && event.preventDefault());
  // One listener for both: between two of them the requests would fail, and nothing would be under way.
  addEventListener("pagehide", () => (write(), leave()));
  for (const request of read()) fail(request, "The page was closed or loaded again before this was done.");
}

function write() {
  try {
    sessionStorage.setItem(NAME, encode(running().map(({ request }) => request)));
  } catch {
    // more than the browser keeps, or it keeps nothing
  }
}

function read() {
  try {
    return decode(sessionStorage.getItem(NAME)) ?? [];
  } catch {
    return [];
  }
}
