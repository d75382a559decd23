// One lane: its images, filling up step by step. Those that leave are shown for a moment longer.
import { html } from "../lib/html.js";
import { useEffect, useRef, useState } from "../vendor/hooks.js";
import { count, howMade, laneName, milliseconds, nameOf, stateOf } from "./words.js";

const LEAVING = 900; // milliseconds
const MOST_TICKS = 60; // steps that can be told apart

export function Lane({ lane, requests, left }) {
  const images = useLeaving(lane.images, left);
  const call = lane.rows === null ? "" : `${count(lane.rows, "row")} in ${milliseconds(lane.seconds)}`;
  return html`<section class=${`lane${lane.current ? " current" : ""}`}>
    <h3>${laneName(lane)} <span class="hint">${call}</span></h3>
    <ul>
      ${images.map((image) => html`<${Seat} key=${keyOf(image)} image=${image} request=${requests.get(image.request)} />`)}
    </ul>
  </section>`;
}

export function hue(number) {
  return (number * 137.5) % 360; // neighbours differ most by the golden angle
}

function Seat({ image, request }) {
  const known = useRef(request);
  if (request) known.current = request;
  const shown = known.current;
  const classes = ["seat", image.left && "leaves", !image.rows && !image.left && "pauses"].filter(Boolean);
  const style = { "--hue": hue(image.request), "--done": image.step / image.num_steps, "--steps": image.num_steps };
  const several = shown?.num_images > 1 ? ` ${image.image + 1}/${shown.num_images}` : "";
  return html`<li class=${classes.join(" ")} style=${style}>
    <span class="whose" dir="auto" title=${nameOf(shown)}>${nameOf(shown)}<b>${several}</b></span>
    <span class="how hint">${howMade(shown)}</span>
    <span class=${`filling${image.num_steps > MOST_TICKS ? "" : " ticks"}`}><i></i></span>
    <span class="steps">${image.step}/${image.num_steps}</span>
    <span class="hint">${image.left ? image.reason : stateOf(image)}</span>
  </li>`;
}

// `images`, and those that were among them a moment ago; `left` says why some of these have gone.
function useLeaving(images, left) {
  const [leaving, setLeaving] = useState([]);
  const before = useRef([]);
  useEffect(() => {
    const here = new Set(images.map(keyOf));
    const gone = before.current.filter((image) => !here.has(keyOf(image)));
    before.current = images;
    if (!gone.length) return;
    const now = gone.map((image) => leave(image, left));
    setLeaving((others) => [...others, ...now]);
    setTimeout(() => setLeaving((others) => others.filter((one) => !now.includes(one))), LEAVING);
  }, [images]);
  const here = new Set(images.map(keyOf));
  return [...images, ...leaving.filter((image) => !here.has(keyOf(image)))].sort(inOrder);
}

function leave(image, left) {
  const isDone = image.step >= image.num_steps || left.some((one) => keyOf(one) === keyOf(image) && one.reason === "done");
  return { ...image, step: isDone ? image.num_steps : image.step, left: true, reason: isDone ? "done" : "ended" };
}

function keyOf({ request, image }) {
  return `${request}.${image}`;
}

function inOrder(one, other) {
  return one.request - other.request || one.image - other.image;
}
