// A request as the gallery keeps it: its images are blobs beside it, which are read only when they are needed.
import { asDataUri, blobOf } from "../form/images/files.js";
import { decode, encode } from "../lib/numbers.js";

// {request: JSON, images: blobs}. An image is replaced by the number of its blob.
export function stored(request) {
  const images = [];
  const text = encode(replaced(request, isImage, (data) => ({ blob: images.push(blobOf(data)) - 1 })));
  return { request: text, images };
}

// The request of a picture, with its images.
export async function requestOf({ request, images = [] }) {
  const data = await Promise.all(images.map(asDataUri));
  return replaced(decode(request), isNumber, ({ blob }) => data[blob]);
}

const isImage = (value) => typeof value === "string" && value.startsWith("data:image/");
const isNumber = (value) => typeof value?.blob === "number";

function replaced(value, isMeant, change) {
  if (isMeant(value)) return change(value);
  if (Array.isArray(value)) return value.map((one) => replaced(one, isMeant, change));
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, replaced(one, isMeant, change)]));
}
