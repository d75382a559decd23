// How many generations are sent at once. A browser has six connections to a server (HTTP/1.1), and all its tabs share
// them. With all of them in use no page could ask for anything else, so tabs tell each other how many they have sent.
// Each may always send one: it does not wait for ever for a tab that has crashed.
// (Web Locks would do more of this, but browsers have them only where there is TLS, and on localhost.)
const AT_ONCE = 4;
const channel = new BroadcastChannel("sdbento.sent");
const tab = Math.random();
const others = new Map(); // how many each other tab has sent
const waiting = [];
let sent = 0;
let told = 0;

channel.onmessage = ({ data }) => {
  others.set(data.tab, data.sent);
  if (data.isNew) tell();
  next();
};
tell(true);

// The page is left, and with it all that it has sent.
export const leave = () => channel.postMessage({ tab, sent: 0 });

export async function inTurn(signal, work) {
  await turn(signal);
  try {
    return await work();
  } finally {
    sent -= 1;
    next();
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
    next();
  });
}

function next() {
  while (waiting.length && isFree()) {
    sent += 1;
    waiting.shift()();
  }
  if (sent !== told) tell();
}

function isFree() {
  return !sent || [...others.values()].reduce((sum, one) => sum + one, sent) < AT_ONCE;
}

function tell(isNew = false) {
  told = sent;
  channel.postMessage({ tab, sent, isNew });
}
