// The language of the components: htm's templates, which make Preact's elements.
import htm from "../vendor/htm.js";
import { h } from "../vendor/preact.js";

export const html = htm.bind(h);
