// Image files as data URIs, which requests carry. They are shown as blobs: a long URI makes the page slow.
import { notify } from "../../lib/notice.js";

const MOST_MB = 40; // more would not fit into a request, which has four letters for three bytes

// {data, address, width, height}, or null if it is no image. `data`: a data URI, or base64 alone
export async function measure(data) {
  try {
    return await shownAs(data, blobOf(data));
  } catch {
    return null;
  }
}

async function shownAs(data, blob) {
  const image = new Image();
  image.src = URL.createObjectURL(blob);
  await image.decode();
  return { data, address: image.src, width: image.naturalWidth, height: image.naturalHeight };
}

export function blobOf(data, otherwise = "image/png") {
  const [, type = otherwise, base64] = /^(?:data:([^;,]*);base64,)?(.*)$/s.exec(data);
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type });
}

export function asDataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// The image of a file that the user has given; says what is wrong with it, and is null then.
export async function readImage(file) {
  const megabytes = file.size / 1e6;
  if (megabytes > MOST_MB) {
    notify(`This file has ${Math.round(megabytes)} MB. Files of up to ${MOST_MB} MB can be sent.`);
    return null;
  }
  const image = await shownAs(await asDataUri(file), file).catch(() => null);
  if (!image) notify("This file is no image that the browser can show.");
  return image;
}

// The first image of a drop or of the clipboard.
export function imageIn(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));
}

// The image that was dropped; says so if it is something else.
export function droppedImage({ dataTransfer }) {
  const image = imageIn(dataTransfer);
  if (!image && dataTransfer?.files.length) notify("This file is no image.");
  return image;
}

// Makes an element a place to drop an image on.
export function onlyDrops(take) {
  return {
    onDragOver: (event) => event.preventDefault(),
    onDrop: (event) => {
      event.preventDefault(); // else the browser would open the file
      event.stopPropagation(); // it is not for the page as a whole
      const file = droppedImage(event);
      if (file) take(file);
    },
  };
}
