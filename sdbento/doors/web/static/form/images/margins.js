// Margins around an image, to be painted: as numbers, or by dragging its edges.
import { html } from "../../lib/html.js";
import { useStore } from "../../lib/store.js";
import { useRef } from "../../vendor/hooks.js";
import { ErrorOf, clearError } from "../errors.js";
import { NumberField } from "../fields.js";
import { change, settings } from "../settings.js";

const GRAIN = 8; // sizes are multiples of it
const SIDES = { left: [-1, 0], right: [1, 0], top: [0, -1], bottom: [0, 1] };

export function Margins({ image }) {
  const now = useStore(settings);
  const margins = Object.fromEntries(Object.keys(SIDES).map((side) => [side, Number(now[side]) || 0]));
  return html`<div class="margins" data-param="outpaint">
    <${Sheet} ...${{ image, margins }} />
    <div class="row">
      <${NumberField} name="left" label="Left" min="0" step="8" placeholder="0" param="outpaint.left" />
      <${NumberField} name="right" label="Right" min="0" step="8" placeholder="0" param="outpaint.right" />
      <${NumberField} name="top" label="Top" min="0" step="8" placeholder="0" param="outpaint.top" />
      <${NumberField} name="bottom" label="Bottom" min="0" step="8" placeholder="0" param="outpaint.bottom" />
    </div>
    <p class="hint">Pixels to add on each side. Drag the edges, or enter them.</p>
    <${ErrorOf} param="outpaint" />
  </div>`;
}

function Sheet({ image, margins }) {
  const { left, right, top, bottom } = margins;
  const [width, height] = [image.width + left + right, image.height + top + bottom];
  const percent = (part, whole) => `${(100 * part) / whole}%`;
  const place = {
    left: percent(left, width),
    top: percent(top, height),
    width: percent(image.width, width),
    height: percent(image.height, height),
  };
  return html`<div class="sheet" style=${{ aspectRatio: `${width} / ${height}` }}>
    <img src=${image.data} alt="The image to extend" style=${place} />
    ${Object.keys(SIDES).map((side) => html`<${Edge} ...${{ side, width, margins }} />`)}
  </div>`;
}

function Edge({ side, width, margins }) {
  const drag = useRef(null);
  const [x, y] = SIDES[side];
  return html`<span
    class=${`edge ${side}`}
    onPointerDown=${(event) => {
      event.preventDefault();
      event.target.setPointerCapture(event.pointerId);
      const scale = width / event.target.parentElement.getBoundingClientRect().width;
      drag.current = { x: event.clientX, y: event.clientY, scale, from: margins[side] };
    }}
    onPointerMove=${(event) => {
      if (!drag.current) return;
      const { scale, from } = drag.current;
      const moved = (event.clientX - drag.current.x) * x + (event.clientY - drag.current.y) * y;
      clearError("outpaint");
      const margin = Math.max(0, Math.round((from + moved * scale) / GRAIN) * GRAIN);
      change({ [side]: margin ? String(margin) : "" });
    }}
    onPointerUp=${() => (drag.current = null)}
    onPointerCancel=${() => (drag.current = null)}
  ></span>`;
}
