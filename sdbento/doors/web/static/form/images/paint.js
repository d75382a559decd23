// Strokes on a canvas, and as a mask. A stroke is {size, points}, in the image's pixels.
const COLOUR = [0x4f, 0x46, 0xe5];

// `base`: the mask below the strokes, an image, or null
export function draw(canvas, base, strokes) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (base) tint(context, base, canvas);
  for (const stroke of strokes) paint(context, stroke, `rgb(${COLOUR})`);
}

// A mask as a data URI: white where strokes are.
export function asMask({ width, height }, base, strokes) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.fillRect(0, 0, width, height);
  if (base) context.drawImage(base, 0, 0, width, height);
  for (const stroke of strokes) paint(context, stroke, "white");
  return canvas.toDataURL("image/png");
}

function paint(context, { size, points }, colour) {
  context.strokeStyle = context.fillStyle = colour;
  context.lineWidth = size;
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.arc(...points[0], size / 2, 0, 2 * Math.PI); // a line to where it begins leaves no mark
  context.fill();
  context.beginPath();
  context.moveTo(...points[0]);
  for (const point of points) context.lineTo(...point);
  context.stroke();
}

// What is white in a mask, in the brush's colour.
function tint(context, base, { width, height }) {
  context.drawImage(base, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data[i + 3] = pixels.data[i];
    pixels.data.set(COLOUR, i);
  }
  context.putImageData(pixels, 0, 0);
}
