// An answer of the server as pictures for the gallery.
import { blobOf } from "../../form/images/files.js";
import { stored } from "../stored.js";

const TYPES = { png: "image/png", jpeg: "image/jpeg", webp: "image/webp" };

export async function picturesOf(request, response) {
  const { num_images: _, preview_every: __, ...asked } = request;
  const type = TYPES[request.output_format ?? "png"];
  const made = response.images.map(async (image, i) => {
    const blob = blobOf(image, type);
    const seed = seedIn(response.infotexts[i]) ?? String(response.seeds[i]);
    return {
      at: Date.now(),
      blob,
      seed,
      ...stored({ ...asked, seed }),
      model: response.model,
      infotext: response.infotexts[i],
      seconds: response.timings.total,
      warnings: response.warnings,
      ...(await sizeOf(blob)),
    };
  });
  return await Promise.all(made);
}

// A number may have more digits than JavaScript's have; the text has them all.
const seedIn = (infotext) => /(?:^|, )Seed: (\d+)/m.exec(infotext.split("\n").pop())?.[1];

async function sizeOf(blob) {
  const bitmap = await createImageBitmap(blob);
  const { width, height } = bitmap;
  bitmap.close();
  return { width, height };
}
