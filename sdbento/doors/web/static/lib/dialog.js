// A dialog, open while `open` is true. Escape asks `onCancel` to close it.
import { useEffect, useRef } from "../vendor/hooks.js";
import { html } from "./html.js";

export function Dialog({ name, title, open, onCancel, children }) {
  const dialog = useRef();
  useEffect(() => {
    if (open && !dialog.current.open) dialog.current.showModal();
    if (!open && dialog.current.open) dialog.current.close();
  }, [open]);
  const cancelled = (event) => {
    event.preventDefault(); // it closes when `open` changes
    onCancel();
  };
  return html`<dialog ref=${dialog} aria-labelledby=${`${name}-title`} onCancel=${cancelled}>
    <h2 id=${`${name}-title`}>${title}</h2>
    ${open && children}
  </dialog>`;
}
