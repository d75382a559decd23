// JSON with seeds: they may have 63 bits, more than a number of JavaScript holds. They are text here.

export function encode(value) {
  return JSON.stringify(value, (name, inner) =>
    name === "seed" && typeof inner === "string" ? (JSON.rawJSON?.(inner) ?? Number(inner)) : inner,
  );
}

export function decode(text) {
  return JSON.parse(text, (name, inner, context) =>
    name === "seed" && typeof inner === "number" ? (context?.source ?? String(inner)) : inner,
  );
}

export function seconds(value) {
  if (value < 1) return "less than a second";
  if (value < 90) return `${Math.round(value)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}
