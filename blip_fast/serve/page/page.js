// The page: pictures come in by dropping, pasting or choosing, and each becomes a card.

import { info, ready, useKey } from "./api.js";
import { caption } from "./captioning.js";
import { Card } from "./card.js";
import { announce, say } from "./dom.js";
import { described, useLimits } from "./limits.js";
import { searchSimilar, startSearch } from "./search.js";

const find = (name) => document.getElementById(name);

let cards = []; // as they stand on the page

/** Make the page what the server can do, which it knows when it has its models. */
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

/** How captions are written: as many of a picture as the server may give, three unless changed. */
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
  find("progress").textContent = all === 0 ? "None yet." : finished === all ? `${all}` : `${finished} of ${all} ready`;
  find("clear").hidden = all < 2;
}

/** Hand over the files that are dropped, pasted or chosen. */
function takePictures(take) {
  const some = (transfer) => transfer.types.includes("Files");
  const isText = (event) => !some(event.dataTransfer) && event.target.closest("input, textarea");
  const given = (files) => {
    say(find("drop-error"), files.length ? "" : "That was no file. Save the picture first, then drop or choose it.");
    if (files.length) take([...files]);
  };
  find("files").addEventListener("change", (event) => {
    given(event.target.files);
    event.target.value = ""; // so that the same file may be chosen again
  });
  addEventListener("paste", (event) => {
    if (!some(event.clipboardData)) return; // a text, for the field that has the focus
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
    event.preventDefault(); // a browser would go to what is dropped, away from this page
    find("drop").classList.remove("over");
    given(event.dataTransfer.files);
  });
  find("clear").addEventListener("click", () => [...cards].forEach((card) => card.remove()));
  find("key").addEventListener("input", (event) => useKey(event.target.value));
  find("key-form").addEventListener("submit", (event) => event.preventDefault());
}

start();
