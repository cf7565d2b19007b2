// Checks the server's limits before an upload. The server checks them again.

import { bytes, pixels } from "./dom.js";

let limits = {};

/** Use the limits of /v1/info. */
export function useLimits(given) {
  limits = given;
}

/** The limits as a sentence. */
export function described() {
  return `Up to ${bytes(limits.upload_bytes)} and ${pixels(limits.pixels)} each.`;
}

/** Why a file cannot be captioned, judging by its type and size; "" if it can. */
export function refusedFile(file) {
  const kind = file.type || "of no known type";
  if (!file.type.startsWith("image/") || file.type === "image/svg+xml") {
    return `This is no photograph that can be read here (it is ${kind}). Choose a JPEG, PNG or WebP file.`;
  }
  if (file.size === 0) return "This file is empty. Choose another one.";
  if (file.size > limits.upload_bytes) {
    const most = bytes(limits.upload_bytes);
    return `This file has ${bytes(file.size)}, and at most ${most} are taken. Save it smaller.`;
  }
  return "";
}

/** Why a picture of this width and height cannot be captioned; "" if it can. */
export function refusedSize(width, height) {
  if (width * height <= limits.pixels) return "";
  const most = pixels(limits.pixels);
  return `This picture has ${width} × ${height} pixels, and at most ${most} are taken. Save it smaller.`;
}

/** Why texts cannot be sent; "" if they can. */
export function refusedTexts(texts) {
  if (texts.length === 0) return "There is no text yet: type one.";
  if (texts.length > limits.texts) {
    return `These are ${texts.length} texts, and at most ${limits.texts} are taken.`;
  }
  const longest = Math.max(...texts.map((text) => text.length));
  if (longest > limits.text_characters) {
    const most = limits.text_characters;
    return `A text has ${longest} characters, and at most ${most} are taken. Make it shorter.`;
  }
  return "";
}

/** As many items from the start of a list as fit one request, at least one. `file` returns an item's file. */
export function oneRequest(items, file) {
  const room = limits.upload_bytes - 65536; // minus the multipart overhead and other fields
  let [count, size] = [1, file(items[0]).size];
  while (count < Math.min(items.length, limits.images) && size + file(items[count]).size <= room) {
    size += file(items[count]).size;
    count += 1;
  }
  return items.slice(0, count);
}
