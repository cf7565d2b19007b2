// The page: pictures are dropped, pasted or chosen, and each becomes a card.

import { info, ready, useKey } from "./api.js";
import { caption } from "./captioning.js";
import { Card } from "./card.js";
import { announce, say } from "./dom.js";
import { described, useLimits } from "./limits.js";
import { searchSimilar, startSearch } from "./search.js";

const find = (name) => document.getElementById(name);

let cards = []; // in their order on the page

/** Wait until the server has loaded its models, and set up the page by its features. */
async function start() {
  for (;;) {
    try {
      await ready();
      break;
    } catch (error) {
      say(find("broken"), error.message);
      await new Promise((wake) => setTimeout(wake, 2000));
    }
  }
  say(find("broken"), "");
  const server = await info();
  find("model").textContent = `${server.model} · blip_fast ${server.version}`;
  find("key-form").hidden = !server.auth;
  useLimits(server.limits);
  find("limits").textContent = described();
  if (server.features.caption) showOptions(server.limits);
  if (server.features.search) startSearch();
  takePictures((files) => add(files, server.features));
}

/** Show the captioning options. The number of captions is three by default, if the server allows it. */
function showOptions(limits) {
  const numbers = Array.from({ length: limits.captions }, (_, i) => new Option(i + 1));
  find("num").replaceChildren(...numbers);
  find("num").value = Math.min(3, limits.captions);
  find("prompt").maxLength = limits.text_characters;
  find("options").hidden = false;
}

async function add(files, features) {
  const on = {
    again: (card) => caption([card], options),
    changed: showProgress,
    removed: forget,
    similar: (card) => searchSimilar(card.file),
  };
  const added = files.map((file) => new Card(file, features, on));
  cards = [...added, ...cards];
  find("cards").prepend(...added.map((card) => card.element));
  announce(files.length === 1 ? `${files[0].name} added.` : `${files.length} pictures added.`);
  showProgress();
  const readable = await Promise.all(added.map((card) => card.isReadable()));
  if (features.caption) caption(added.filter((_, i) => readable[i]), options);
}

const options = () => ({ num: find("num").value, prompt: find("prompt").value.trim() });

function forget(card) {
  const next = cards[cards.indexOf(card) + 1] ?? cards[cards.indexOf(card) - 1];
  cards = cards.filter((each) => each !== card);
  (next ? next.find(".remove") : find("files")).focus();
  showProgress();
}

function showProgress() {
  const [finished, all] = [cards.filter((card) => card.finished).length, cards.length];
  const counts = finished === all ? `${all}` : `${finished} of ${all} ready`;
  find("progress").textContent = all === 0 ? "None yet." : counts;
  find("clear").hidden = all < 2;
}

/** Pass the files that are dropped, pasted or chosen to `take`. */
function takePictures(take) {
  const some = (transfer) => transfer.types.includes("Files");
  const isText = (event) => !some(event.dataTransfer) && event.target.closest("input, textarea");
  const given = (files) => {
    const sentence = "That was no file. Save the picture first, then drop or choose it.";
    say(find("drop-error"), files.length ? "" : sentence);
    if (files.length) take([...files]);
  };
  find("files").addEventListener("change", (event) => {
    given(event.target.files);
    event.target.value = ""; // so that the same file can be chosen again
  });
  addEventListener("paste", (event) => {
    if (!some(event.clipboardData)) return; // text is pasted into the focused field
    event.preventDefault();
    given(event.clipboardData.files);
  });
  addEventListener("dragover", (event) => {
    if (isText(event)) return;
    event.preventDefault();
    find("drop").classList.toggle("over", some(event.dataTransfer));
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) find("drop").classList.remove("over");
  });
  addEventListener("drop", (event) => {
    if (isText(event)) return;
    event.preventDefault(); // otherwise the browser would leave the page for the file
    find("drop").classList.remove("over");
    given(event.dataTransfer.files);
  });
  find("clear").addEventListener("click", () => [...cards].forEach((card) => card.remove()));
  find("key").addEventListener("input", (event) => useKey(event.target.value));
  find("key-form").addEventListener("submit", (event) => event.preventDefault());
}

start();
