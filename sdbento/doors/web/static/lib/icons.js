// Drawings on buttons. They say nothing by themselves: the button has a name.
import { html } from "./html.js";

const LINES = {
  dice: "M5 3h14a2 2 0 0 1 2 2v14a2 2 0 0 1-2 2H5a2 2 0 0 1-2-2V5a2 2 0 0 1 2-2Z M8 8h.01 M16 8h.01 M12 12h.01 M8 16h.01 M16 16h.01",
  key: "M15 9h.01 M21 3l-7.5 7.5 M3 15.5a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0-11 0 M17 7l3 3",
  light: "M12 8a4 4 0 1 0 0 8a4 4 0 1 0 0-8 M12 2v2 M12 20v2 M2 12h2 M20 12h2 M5 5l1.5 1.5 M17.5 17.5L19 19 M5 19l1.5-1.5 M17.5 6.5L19 5",
  dark: "M20 14.5A8.5 8.5 0 1 1 9.5 4a7 7 0 0 0 10.500 10.500Z",
  auto: "M12 3a9 9 0 1 0 0 18a9 9 0 1 0 0-18 M12 3v18 M12 8h6.500 M12 13h8.500 M12 18h4.500",
  remove: "M6 6l12 12 M18 6L6 18",
  image: "M4 5h16a1 1 0 0 1 1 1v12a1 1 0 0 1-1 1H4a1 1 0 0 1-1-1V6a1 1 0 0 1 1-1Z M3 16l5-5 4 4 3-3 6 6 M15 9h.01",
};

export function Icon({ name }) {
  return html`<svg class="drawing" viewBox="0 0 24 24" width="20" height="20" aria-hidden="true">
    <path d=${LINES[name]} />
  </svg>`;
}
