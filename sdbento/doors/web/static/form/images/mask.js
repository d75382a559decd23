// A brush for the part of an image that is repainted: white in the mask that the request carries.
import { html } from "../../lib/html.js";
import { useEffect, useRef, useState } from "../../vendor/hooks.js";
import { ErrorOf, clearError } from "../errors.js";
import { change, settings } from "../settings.js";

const COLOUR = "#4f46e5";

export function Mask({ image }) {
  const canvas = useRef();
  const [size, setSize] = useState(Math.max(8, Math.round(image.width / 8)));
  const [strokes, setStrokes] = useState([]);
  const base = useBase(settings.get().mask_image, image);

  useEffect(() => draw(canvas.current, base.current, strokes), [strokes, base.current]);
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
  const brush = useBrush(canvas, size, (stroke) => keep([...strokes, stroke]));
  return html`<div class="mask" data-param="mask_image">
    <div class="painted">
      <img src=${image.data} alt="The image to repaint a part of" />
      <canvas ref=${canvas} width=${image.width} height=${image.height} aria-label="Paint over what is to be repainted" role="img" ...${brush}></canvas>
    </div>
    <div class="row">
      <label class="brush">Brush
        <input type="range" min="2" max=${Math.round(image.width / 2)} value=${size} onInput=${(event) => setSize(Number(event.target.value))} />
      </label>
      <button type="button" disabled=${!strokes.length} onClick=${() => keep(strokes.slice(0, -1))}>Undo</button>
      <button type="button" disabled=${!strokes.length && !base.current} onClick=${clear}>Clear</button>
    </div>
    <p class="hint">Paint over what is to be repainted.</p>
    <${ErrorOf} param="mask_image" />
  </div>`;
}

// The mask of a request that was restored, below the strokes: an image, or null.
function useBase(mask, image) {
  const [current, set] = useState(null);
  useEffect(() => {
    set(null);
    if (!mask) return;
    const picture = new Image();
    picture.onload = () => set(picture);
    picture.src = mask;
  }, [image.data]);
  return { current, set };
}

// Strokes are lists of points in the image's pixels, {size, points}.
function useBrush(canvas, size, finish) {
  const stroke = useRef(null);
  const point = (event) => {
    const box = canvas.current.getBoundingClientRect();
    const scale = canvas.current.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  };
  const end = () => {
    if (stroke.current) finish(stroke.current);
    stroke.current = null;
  };
  return {
    onPointerDown: (event) => {
      event.preventDefault();
      canvas.current.setPointerCapture(event.pointerId);
      stroke.current = { size, points: [point(event)] };
      paint(canvas.current.getContext("2d"), stroke.current, COLOUR);
    },
    onPointerMove: (event) => {
      if (!stroke.current) return;
      stroke.current.points.push(point(event));
      paint(canvas.current.getContext("2d"), stroke.current, COLOUR);
    },
    onPointerUp: end,
    onPointerCancel: end,
  };
}

function paint(context, { size, points }, colour) {
  context.strokeStyle = context.fillStyle = colour;
  context.lineWidth = size;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.moveTo(...points[0]);
  for (const point of points) context.lineTo(...point);
  context.stroke();
}

function draw(canvas, base, strokes) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (base) tint(context, base, canvas);
  for (const stroke of strokes) paint(context, stroke, COLOUR);
}

// What is white in a mask, in the brush's colour.
function tint(context, base, { width, height }) {
  context.drawImage(base, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data[i + 3] = pixels.data[i];
    [pixels.data[i], pixels.data[i + 1], pixels.data[i + 2]] = [0x4f, 0x46, 0xe5];
  }
  context.putImageData(pixels, 0, 0);
}

function asMask({ width, height }, base, strokes) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.fillRect(0, 0, width, height);
  if (base) context.drawImage(base, 0, 0, width, height);
  for (const stroke of strokes) paint(context, stroke, "white");
  return canvas.toDataURL("image/png");
}
