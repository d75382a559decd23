// Server-sent events of an answer, which `EventSource` could not ask for: it knows no POST and no key.
import { decode } from "../lib/numbers.js";

function explain(error) {
  throw error.name === "AbortError" ? error : new Error("The connection to the server was lost.");
}

export async function* events(response) {
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(explain);
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data: "));
        if (data.length) yield decode(data.map((line) => line.slice(6)).join("\n"));
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the connection may be gone already
  }
}
