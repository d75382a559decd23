// Watches the batch: asks again when the stream ends, and not while nobody can see the page.
import { call } from "../server/calls.js";
import { events } from "../server/events.js";

const PAUSE = 2; // seconds before the server is asked again, where it does not say

// `onBatch` is given each snapshot, `onProblem` an error, and null once it is over. Returns what ends it.
export function watch(onBatch, onProblem) {
  let watching = null;
  const start = () => {
    watching = new AbortController();
    follow(onBatch, onProblem, watching.signal);
  };
  const turn = () => (document.hidden ? watching.abort() : start());
  document.addEventListener("visibilitychange", turn);
  if (document.hidden) watching = new AbortController();
  else start();
  return () => {
    document.removeEventListener("visibilitychange", turn);
    watching.abort();
  };
}

async function follow(onBatch, onProblem, signal) {
  while (!signal.aborted) {
    let pause = PAUSE; // also after the end of a stream, none of which is endless
    try {
      for await (const batch of events(await call("batch", { signal }))) {
        if (signal.aborted) return;
        onProblem(null);
        onBatch(batch);
      }
    } catch (error) {
      if (signal.aborted) return;
      onProblem(error);
      pause = error.retryAfter ?? PAUSE;
    }
    await new Promise((resolve) => setTimeout(resolve, pause * 1000));
  }
}
