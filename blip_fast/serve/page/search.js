// Search in the server's index, by a text or by a picture.

import { indexed, search } from "./api.js";
import { copyOf, figure, work } from "./dom.js";
import { refusedTexts } from "./limits.js";

const find = (name) => document.getElementById(name);

let latest = new AbortController();
let running = Promise.resolve();
let addresses = [];

/** Show the search box and handle its events. */
export function startSearch() {
  find("search").hidden = false;
  find("search-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = find("search-text").value.trim();
    run({ text }, `Pictures for “${text}”`, refusedTexts(text ? [text] : []));
  });
  find("found-close").addEventListener("click", () => {
    close();
    find("search-text").focus();
  });
}

/** Search for pictures similar to a file, and focus the results. */
export async function searchSimilar(file) {
  await run({ image: file }, `Pictures like ${file.name}`, "");
  (find("search-error").hidden ? find("found-heading") : find("search-text")).focus();
}

async function run(query, heading, refused) {
  latest.abort(); // a new search cancels the previous one
  latest = new AbortController();
  const { signal } = latest;
  await running;
  running = work(find("search-form").querySelector("button"), find("search-error"), async () => {
    if (refused) throw new Error(refused);
    const hits = await search(query, signal);
    show(hits, hits.length ? heading : `${heading}: none found`, signal);
  });
  await running;
}

function show(hits, heading, signal) {
  close();
  find("found-heading").textContent = heading;
  find("hits").replaceChildren(...hits.map((hit) => {
    const item = copyOf("hit-template");
    item.querySelector(".name").textContent = hit.name;
    item.querySelector(".hint").textContent = `score ${figure(hit.score)}, cosine ${figure(hit.cosine)}`;
    showThumbnail(item, hit, signal);
    return item;
  }));
  find("found").hidden = false;
}

async function showThumbnail(item, hit, signal) {
  const picture = item.querySelector("img");
  try {
    const address = URL.createObjectURL(await indexed(hit.image, signal));
    addresses.push(address);
    picture.src = address;
    picture.alt = hit.name; // not earlier: it would be shown next to a broken image
  } catch (error) {
    if (error.name !== "AbortError") item.querySelector(".hint").textContent = error.message;
  }
}

function close() {
  find("found").hidden = true;
  addresses.forEach(URL.revokeObjectURL);
  addresses = [];
}
