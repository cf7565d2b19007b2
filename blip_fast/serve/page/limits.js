// What the server would refuse is said here first, without an upload. The server has the last word all the same.

import { bytes, pixels } from "./dom.js";

let limits = {};

/** Take over the limits of /v1/info. */
export function useLimits(given) {
  limits = given;
}

/** What the limits are, as a sentence. */
export function described() {
  return `Up to ${bytes(limits.upload_bytes)} and ${pixels(limits.pixels)} each.`;
}

/** Why a file cannot be captioned, as far as its kind and size tell; "" where nothing does. */
export function refusedFile(file) {
  const kind = file.type || "of no known type";
  if (!file.type.startsWith("image/") || file.type === "image/svg+xml") {
    return `This is no photograph that can be read here (it is ${kind}). Choose a JPEG, PNG or WebP file.`;
  }
  if (file.size === 0) return "This file is empty. Choose another one.";
  if (file.size > limits.upload_bytes) {
    return `This file has ${bytes(file.size)}, and at most ${bytes(limits.upload_bytes)} are taken. Save it smaller.`;
  }
  return "";
}

/** The same of its width and height. */
export function refusedSize(width, height) {
  if (width * height <= limits.pixels) return "";
  const most = pixels(limits.pixels);
  return `This picture has ${width} × ${height} pixels, and at most ${most} are taken. Save it smaller.`;
}

/** Why texts cannot be sent; "" where they can. */
export function refusedTexts(texts) {
  if (texts.length === 0) return "There is no text yet: type one.";
  if (texts.length > limits.texts) return `These are ${texts.length} texts, and at most ${limits.texts} are taken.`;
  const longest = Math.max(...texts.map((text) => text.length));
  if (longest > limits.text_characters) {
    return `A text has ${longest} characters, and at most ${limits.text_characters} are taken. Make it shorter.`;
  }
  return "";
}

/** The first pictures of a list that one request may hold, at least one. `file` gives an item's file. */
export function oneRequest(items, file) {
  const room = limits.upload_bytes - 65536; // for what multipart and the other fields add
  let [count, size] = [1, file(items[0]).size];
  while (count < Math.min(items.length, limits.images) && size + file(items[count]).size <= room) {
    size += file(items[count]).size;
    count += 1;
  }
  return items.slice(0, count);
}
