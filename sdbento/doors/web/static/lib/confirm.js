// A question before something that cannot be undone.
import { Dialog } from "./dialog.js";
import { html } from "./html.js";
import { store, useStore } from "./store.js";

const asked = store(null); // {text, action, otherwise, answer}

// Whether the user presses the button called `action`, and not the one called `otherwise`.
export async function confirmed(text, action, otherwise) {
  const yes = await new Promise((answer) => asked.set({ text, action, otherwise, answer }));
  asked.set(null);
  return yes;
}

export function Confirmation() {
  const question = useStore(asked);
  const answer = (yes) => question.answer(yes);
  return html`<${Dialog} name="confirm" title=${question?.action} open=${Boolean(question)} onCancel=${() => answer(false)}>
    <p>${question?.text}</p>
    <div class="row end">
      <button type="button" autofocus onClick=${() => answer(false)}>${question?.otherwise}</button>
      <button type="button" class="danger" onClick=${() => answer(true)}>${question?.action}</button>
    </div>
  <//>`;
}
