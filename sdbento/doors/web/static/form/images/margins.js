// Margins around an image, to be painted: as numbers, or by dragging its edges.
import { html } from "../../lib/html.js";
import { ARROWS } from "../../lib/keys.js";
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
    <div class="row four">
      <${NumberField} name="left" label="Left" min="0" step="8" placeholder="0" param="outpaint.left" />
      <${NumberField} name="right" label="Right" min="0" step="8" placeholder="0" param="outpaint.right" />
      <${NumberField} name="top" label="Top" min="0" step="8" placeholder="0" param="outpaint.top" />
      <${NumberField} name="bottom" label="Bottom" min="0" step="8" placeholder="0" param="outpaint.bottom" />
    </div>
    <p class="hint">Pixels to add on each side. Drag the edges, move them with the arrow keys, or enter numbers.</p>
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
  const ratio = width / height;
  return html`<div class="sheet" style=${{ aspectRatio: ratio, maxWidth: `calc(60vh * ${ratio})` }}>
    <img src=${image.address} alt="The image to extend" style=${place} />
    ${Object.keys(SIDES).map((side) => html`<${Edge} ...${{ side, width, margins }} />`)}
  </div>`;
}

function Edge({ side, width, margins }) {
  const drag = useRef(null);
  const [x, y] = SIDES[side];
  const set = (margin) => {
    clearError("outpaint");
    const next = Math.max(0, Math.round(margin / GRAIN) * GRAIN);
    change({ [side]: next ? String(next) : "" });
  };
  const onKeyDown = (event) => {
    const [right, down] = ARROWS[event.key] ?? [0, 0];
    const outwards = right * x + down * y;
    if (!outwards) return;
    event.preventDefault();
    set(margins[side] + outwards * GRAIN * (event.shiftKey ? 8 : 1));
  };
  return html`<span
    class=${`edge ${side}`}
    role="slider"
    tabIndex="0"
    aria-label=${`The ${side} edge`}
    aria-orientation=${x ? "horizontal" : "vertical"}
    aria-valuemin="0"
    aria-valuemax="4096"
    aria-valuenow=${margins[side]}
    aria-valuetext=${`${margins[side]} pixels`}
    onKeyDown=${onKeyDown}
    onPointerDown=${(event) => {
      event.preventDefault();
      event.currentTarget.setPointerCapture(event.pointerId);
      const scale = width / event.currentTarget.parentElement.getBoundingClientRect().width;
      drag.current = { x: event.clientX, y: event.clientY, scale, from: margins[side] };
    }}
    onPointerMove=${(event) => {
      if (!drag.current) return;
      const { scale, from } = drag.current;
      set(from + scale * ((event.clientX - drag.current.x) * x + (event.clientY - drag.current.y) * y));
    }}
    onPointerUp=${() => (drag.current = null)}
    onPointerCancel=${() => (drag.current = null)}
  ></span>`;
}
