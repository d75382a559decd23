// Image files that are dropped on the page or pasted into it.
import { droppedImage, imageIn } from "./form/images/files.js";
import { startFrom } from "./form/images/source.js";
import { restoreOr } from "./form/restore.js";

const LINGERS = 200; // milliseconds after the last event of a drag, which browsers repeat while it goes on
let timer = 0;

const holdsFiles = ({ dataTransfer }) => dataTransfer?.types.includes("Files"); // text is the browser's own affair

function mark() {
  document.body.classList.add("dragging");
  clearTimeout(timer);
  timer = setTimeout(() => document.body.classList.remove("dragging"), LINGERS);
}

export function takeDrops() {
  document.addEventListener("dragover", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    mark();
  });
  document.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault(); // else the browser would open the file
    const file = droppedImage(event);
    if (file) restoreOr(file, (one) => startFrom(one, { offer: false }));
  });
}

export function takePastes() {
  document.addEventListener("paste", ({ clipboardData, target }) => {
    const file = imageIn(clipboardData);
    const isText = clipboardData?.types.includes("text/plain"); // word processors add a picture of it
    if (file && !(isText && target.closest?.("input, textarea"))) startFrom(file);
  });
}
