// The batch as a table, for those who hear the page.
import { html } from "../lib/html.js";
import { howMade, laneName, nameOf, stateOf } from "./words.js";

export function Table({ batch, requests }) {
  const rows = batch.lanes.flatMap((lane) => lane.images.map((image) => ({ lane, image })));
  return html`<table>
    <caption>Images in the batch</caption>
    <thead>
      <tr><th scope="col">Request</th><th scope="col">Made with</th><th scope="col">Model and size</th><th scope="col">Step</th><th scope="col">State</th></tr>
    </thead>
    <tbody>
      ${rows.map(
        ({ lane, image }) => html`<tr key=${`${image.request}.${image.image}`}>
          <th scope="row">${nameOf(requests.get(image.request))}</th>
          <td>${howMade(requests.get(image.request))}</td>
          <td>${laneName(lane)}</td>
          <td>${image.step} of ${image.num_steps}</td>
          <td>${stateOf(image) || "in the batch"}</td>
        </tr>`,
      )}
    </tbody>
  </table>`;
}
