// The key that this server wants, if it wants one: asked for, and kept in this browser.
import { Dialog } from "../lib/dialog.js";
import { html } from "../lib/html.js";
import { kept, store, useStore } from "../lib/store.js";

const asking = store(null); // {message, answer}
let answered = null;

export const key = {
  get: () => kept.read("key", ""),
  set: (value) => kept.write("key", value),
};

// Whether the user has given one. All calls that were refused at once wait for the same answer.
export function askForKey(message) {
  answered ??= new Promise((answer) => asking.set({ message, answer })).finally(() => {
    answered = null;
    asking.set(null);
  });
  return answered;
}

export function KeyDialog() {
  const question = useStore(asking);
  const submit = (event) => {
    event.preventDefault();
    key.set(event.target.elements.key.value.trim());
    question.answer(true);
  };
  return html`<${Dialog} name="key" title="Key" open=${Boolean(question)} onCancel=${() => question.answer(false)}>
    <form onSubmit=${submit}>
      <p>${question?.message}</p>
      <label for="key">Key</label>
      <input id="key" name="key" type="password" autocomplete="off" value=${key.get()} />
      <p class="hint">It stays in this browser, and goes to this server only.</p>
      <div class="row end">
        <button type="button" onClick=${() => question.answer(false)}>Not now</button>
        <button class="primary">Use this key</button>
      </div>
    </form>
  <//>`;
}
