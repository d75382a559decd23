// Requests in other languages. Images are files beside the program, but for RunPod, whose JSON has
// them in it. `key` stands for the key where the server has any: the real one is nobody else's business.
import { encode } from "../lib/numbers.js";

const FILES = { image: "image.png", mask_image: "mask.png" };

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

export function asCurl(request, base, key) {
  const route = request.mask_image ? "inpaint" : request.image ? "img2img" : "txt2img";
  const lines = [`curl -s ${base}/${route} -o picture.${request.output_format ?? "png"}`];
  if (key) lines.push(`-H 'Authorization: Bearer ${key}'`);
  if (request.image) {
    for (const [name, value] of Object.entries(request)) lines.push(part(name, value));
  } else {
    lines.push(`-d ${quoted(encode(request))}`);
  }
  return `${lines.join(" \\\n  ")}\n`;
}

// A part of a form: files by their names, objects as JSON.
function part(name, value) {
  if (name in FILES) return `-F ${name}=@${FILES[name]}`;
  const text = typeof value === "object" ? encode(value) : value;
  return `--form-string ${quoted(`${name}=${text}`)}`; // of -F, a text like <lora:name:1> would name a file
}

export function asPython(request, base, key) {
  const { prompt, ...fields } = request;
  const given = Object.entries(fields).map(([name, value]) => `    ${name}=${fileOr(name, value)},`);
  return `from pathlib import Path

from sdbento.client import Client

client = Client("${base}", api_key=${key ? `"${key}"` : "None"})
made = client.generate(
    ${literal(prompt)},
${given.join("\n")}
)
made.save("picture.${request.output_format ?? "png"}")
`;
}

const fileOr = (name, value) => (name in FILES ? `Path("${FILES[name]}")` : literal(value, name));

// A value of JSON as Python writes it.
function literal(value, name) {
  if (value === null || value === undefined) return "None";
  if (value === true || value === false) return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map((one) => literal(one)).join(", ")}]`;
  if (typeof value === "object") {
    const items = Object.entries(value).map(([key, one]) => `"${key}": ${literal(one, key)}`);
    return `{${items.join(", ")}}`;
  }
  return name === "seed" ? String(value) : JSON.stringify(value);
}

export function asOpenAI(request, base, key) {
  const { prompt, model, width, height, image, ...others } = request;
  const fields = [`prompt=${literal(prompt)}`];
  if (model) fields.push(`model=${literal(model)}`);
  if (width && height) fields.push(`size="${width}x${height}"`);
  if (image) fields.push(`image=Path("${FILES.image}")`);
  const extra = Object.entries(others).map(([name, value]) => `        "${name}": ${encodedOr(name, value)},`);
  if (extra.length) fields.push(`extra_body={\n${extra.join("\n")}\n    }`);
  return `import base64
from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url="${base}/v1", api_key="${key ?? "none"}")
answer = client.images.${image ? "edit" : "generate"}(
${fields.map((field) => `    ${field},`).join("\n")}
)
Path("picture.${request.output_format ?? "png"}").write_bytes(base64.b64decode(answer.data[0].b64_json))
`;
}

function encodedOr(name, value) {
  if (name !== "mask_image") return literal(value, name);
  return `base64.b64encode(Path("${FILES.mask_image}").read_bytes()).decode()`;
}

export function asRunPod(request) {
  return `${JSON.stringify(JSON.parse(encode({ input: request })), null, 2)}\n`;
}
