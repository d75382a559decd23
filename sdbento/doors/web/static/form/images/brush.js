// The brush over an image, moved by a pointer or by keys. Places are in the image's pixels.
import { ARROWS } from "../../lib/keys.js";
import { useRef, useState } from "../../vendor/hooks.js";

const GROWTH = 1.25; // by a press of a key

export const largest = ({ width, height }) => Math.round(Math.max(width, height) / 2);

// `end` is given each stroke that is done. Returns the brush's `place`, the `stroke` that is being painted, if one
// is, what has just been `said` of it, and handlers for a canvas of the image's size.
export function useBrush(image, size, setSize, end) {
  const [place, setPlace] = useState([Math.round(image.width / 2), Math.round(image.height / 2)]);
  const [said, say] = useState("");
  const [, redraw] = useState(0);
  const stroke = useRef(null);

  const lift = () => {
    if (stroke.current) end(stroke.current);
    stroke.current = null;
  };
  const press = (at) => {
    stroke.current = { size, points: [at] };
    setPlace(at);
    redraw((times) => times + 1);
  };
  const move = (at) => {
    stroke.current?.points.push(at);
    setPlace(at);
  };
  const resize = (factor) => {
    const next = Math.min(largest(image), Math.max(2, Math.round(size * factor)));
    setSize(next);
    say(`The brush has ${next} pixels`);
  };
  const step = ([x, y], far) => {
    const length = Math.max(1, Math.round(far ? size : size / 4));
    const at = [within(place[0] + x * length, image.width), within(place[1] + y * length, image.height)];
    move(at);
    say(`${stroke.current ? "Painted to" : "Brush at"} ${at[0]}, ${at[1]}`);
  };
  const onKeyDown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in ARROWS) step(ARROWS[event.key], event.shiftKey);
    else if ("[-".includes(event.key)) resize(1 / GROWTH);
    else if ("]+".includes(event.key)) resize(GROWTH);
    else if (event.key !== " ") return;
    else if (!event.repeat) {
      press(place);
      say(`Painted at ${place[0]}, ${place[1]}`);
    }
    event.preventDefault(); // the page would scroll
  };
  const pointed = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * image.width) / box.width,
      ((event.clientY - box.top) * image.height) / box.height,
    ];
  };
  const handlers = {
    onKeyDown,
    onKeyUp: (event) => event.key === " " && lift(),
    onBlur: lift,
    onPointerDown: (event) => {
      event.preventDefault();
      event.currentTarget.focus({ preventScroll: true });
      event.currentTarget.setPointerCapture(event.pointerId);
      press(pointed(event));
    },
    onPointerMove: (event) => move(pointed(event)),
    onPointerUp: lift,
    onPointerCancel: lift,
  };
  return { place, said, stroke: stroke.current, handlers };
}

const within = (value, most) => Math.min(most, Math.max(0, value));
