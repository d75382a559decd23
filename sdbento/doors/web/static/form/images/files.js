// Image files as data URIs, which requests carry, with the size of their image.
export function measure(data) {
  return new Promise((resolve) => {
    const image = new Image();
    image.onload = () => resolve({ data, width: image.naturalWidth, height: image.naturalHeight });
    image.onerror = () => resolve(null);
    image.src = /^(data|https?):/.test(data) ? data : `data:;base64,${data}`;
  });
}

export function asDataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

export async function readImage(file) {
  return await measure(await asDataUri(file));
}

// The first image of a drop or of the clipboard.
export function imageIn(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));
}

// A place to drop an image on, or to choose a file by.
export function onlyDrops(take) {
  return {
    onDragOver: (event) => event.preventDefault(),
    onDrop: (event) => {
      const file = imageIn(event.dataTransfer);
      if (!file) return;
      event.preventDefault();
      event.stopPropagation();
      take(file);
    },
  };
}
