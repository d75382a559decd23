// The part of an image that is repainted: painted by a brush, white in the mask that the request carries.
import { html } from "../../lib/html.js";
import { useEffect, useRef, useState } from "../../vendor/hooks.js";
import { ErrorOf, clearError } from "../errors.js";
import { change, settings } from "../settings.js";
import { largest, useBrush } from "./brush.js";
import { asMask, draw } from "./paint.js";

export function Mask({ image }) {
  const canvas = useRef();
  const [size, setSize] = useState(Math.max(8, Math.round(image.width / 8)));
  const [strokes, setStrokes] = useState([]);
  const base = useBase(settings.get().mask_image);

  const keep = (next) => {
    setStrokes(next);
    clearError("mask_image");
    change({ mask_image: next.length || base.current ? asMask(image, base.current, next) : null });
  };
  const clear = () => {
    base.set(null);
    setStrokes([]);
    change({ mask_image: null });
  };
  const undo = () => strokes.length && keep(strokes.slice(0, -1));
  const { place, said, stroke, handlers } = useBrush(image, size, setSize, (done) => keep([...strokes, done]));
  useEffect(() => {
    draw(canvas.current, base.current, stroke ? [...strokes, stroke] : strokes);
  }, [strokes, base.current, stroke?.points.length]);
  const ratio = image.width / image.height;
  return html`<div class="mask" data-param="mask_image">
    <div class="painted" style=${{ aspectRatio: ratio, maxWidth: `calc(60vh * ${ratio})` }} onKeyDown=${undoing(undo)}>
      <img src=${image.address} alt="The image to repaint a part of" />
      <canvas
        ref=${canvas} width=${image.width} height=${image.height} tabIndex="0" role="application"
        aria-label="Paint over what is to be repainted" aria-describedby="mask-keys" ...${handlers}
      ></canvas>
      <${Ring} ...${{ image, place, size }} />
    </div>
    <div class="row">
      <label class="brush">Brush
        <input type="range" min="2" max=${largest(image)} value=${size} onInput=${(event) => setSize(Number(event.target.value))} />
      </label>
      <button type="button" disabled=${!strokes.length} onClick=${undo}>Undo</button>
      <button type="button" disabled=${!strokes.length && !base.current} onClick=${clear}>Clear</button>
    </div>
    <p class="hint" id="mask-keys">
      Paint over what is to be repainted. <span class="keys">By keyboard: arrow keys move the brush, Space paints, <kbd>[</kbd> and <kbd>]</kbd> change its size.</span>
    </p>
    <p class="unseen" aria-live="polite">${said}</p>
    <${ErrorOf} param="mask_image" />
  </div>`;
}

const undoing = (undo) => (event) => {
  if (event.key !== "z" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  undo();
};

// Where the brush is, and how large.
function Ring({ image: { width, height }, place: [x, y], size }) {
  const percent = (part, whole) => `${(100 * part) / whole}%`;
  return html`<span class="ring" style=${{ left: percent(x, width), top: percent(y, height), width: percent(size, width) }}></span>`;
}

// The mask of a request that was restored, below the strokes: an image, or null.
function useBase(mask) {
  const [current, set] = useState(null);
  useEffect(() => {
    if (!mask) return;
    const picture = new Image();
    picture.onload = () => set(picture);
    picture.src = mask;
  }, []);
  return { current, set };
}
