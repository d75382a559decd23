// How many generations are sent at once. A browser has six connections to a server (HTTP/1.1). With all of them
// in use the page could ask for nothing else, and no other tab could open.
const AT_ONCE = 4;
let taken = 0;
const waiting = [];

export async function inTurn(signal, work) {
  if (taken === AT_ONCE) await turn(signal);
  else taken += 1;
  try {
    return await work();
  } finally {
    if (waiting.length) waiting.shift()(); // who is next has this place
    else taken -= 1;
  }
}

function turn(signal) {
  return new Promise((resolve, reject) => {
    waiting.push(resolve);
    signal.addEventListener("abort", () => {
      const at = waiting.indexOf(resolve);
      if (at >= 0) waiting.splice(at, 1);
      reject(signal.reason);
    });
  });
}
