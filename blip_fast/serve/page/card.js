// A card: a picture, its captions, and forms to ask about it.

import { ask, explain, score } from "./api.js";
import { announce, bytes, copyOf, figure, percent, say, work } from "./dom.js";
import { refusedFile, refusedSize, refusedTexts } from "./limits.js";

const STATES = {
  reading: "Reading the picture …",
  waiting: "Waiting for its turn …",
  sent: "Being captioned …",
  done: "",
  failed: "",
};

export class Card {
  /**
   * `features` are those of /v1/info. `on` has callbacks: `again` (caption the card again), `changed` (its state
   * has changed), `removed`, and `similar` (search the index for similar pictures).
   */
  constructor(file, features, on) {
    this.file = file;
    this.on = on;
    this.life = new AbortController();
    this.element = copyOf("card-template");
    this.address = URL.createObjectURL(file);
    this.find(".name").textContent = file.name;
    this.find(".size").textContent = bytes(file.size);
    this.element.setAttribute("aria-label", file.name);
    this.find(".remove").setAttribute("aria-label", `Remove ${file.name}`);
    this.find(".remove").addEventListener("click", () => this.remove());
    this.find(".again").addEventListener("click", () => on.again(this));
    this.find(".ask").hidden = !features.ask;
    this.find(".rank").hidden = !features.score;
    this.find(".similar").hidden = !features.search;
    this.find(".find").addEventListener("click", () => on.similar(this));
    this.explains = features.explain;
    this.onSubmit(".ask", () => this.ask());
    this.onSubmit(".rank", () => this.rank());
    this.enter("reading");
  }

  get signal() {
    return this.life.signal;
  }

  get removed() {
    return this.signal.aborted;
  }

  get finished() {
    return ["done", "failed"].includes(this.state);
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  /** Show the picture. Resolves to whether it can be sent; if not, the card says why. */
  async isReadable() {
    const refused = refusedFile(this.file) || await this.show();
    if (refused) this.fail(refused, false);
    else this.enter("done"); // captions, if requested, change the state again
    return !refused;
  }

  /**
   * Show the picture. Resolves to why it cannot be sent, or "". A picture that the browser cannot show is not
   * refused, since the server may be able to read it.
   */
  async show() {
    const picture = this.find(".picture");
    picture.alt = this.file.name;
    this.viewable = await new Promise((tell) => {
      picture.addEventListener("load", () => tell(true));
      picture.addEventListener("error", () => tell(false));
      picture.src = this.address;
    });
    picture.hidden = !this.viewable;
    if (!this.viewable) return "";
    const { naturalWidth: width, naturalHeight: height } = picture;
    this.find(".size").textContent = `${width} × ${height}, ${bytes(this.file.size)}`;
    const refused = refusedSize(width, height);
    if (refused) picture.removeAttribute("src"); // only measured; do not decode it
    return refused;
  }

  enter(state) {
    this.state = state;
    this.element.dataset.state = state;
    this.element.setAttribute("aria-busy", String(!this.finished));
    say(this.find(".state"), STATES[state]);
    this.find(".failed").hidden = state !== "failed";
    this.on.changed();
  }

  isWaiting() {
    this.enter("waiting");
  }

  isSent() {
    this.enter("sent");
  }

  isCaptioned(captions) {
    const lines = captions.map(({ text, score }) => {
      const line = copyOf("caption-template");
      line.querySelector(".text").textContent = text;
      line.querySelector(".number").textContent = figure(score);
      return line;
    });
    this.find(".captions").replaceChildren(...lines);
    this.find(".scale").hidden = false;
    this.find(".picture").alt = captions[0].text;
    if (this.explains) this.showWords(captions[0].text);
    this.enter("done");
    announce(`${this.file.name}: ${captions[0].text}`);
  }

  hasFailed(refusal) {
    this.fail(refusal.message, !refusal.ofPicture);
  }

  /** Say why there is no caption. `again`: whether the user can try again. */
  fail(sentence, again) {
    this.find(".failed .error").textContent = sentence;
    this.find(".again").hidden = !again;
    for (const tool of this.element.querySelectorAll("form, .similar")) tool.hidden ||= !again;
    this.enter("failed");
  }

  remove() {
    this.life.abort();
    this.showHeat(null);
    URL.revokeObjectURL(this.address);
    this.on.removed(this);
    this.element.remove();
  }

  /** Show a button for each distinct word of the caption. */
  showWords(text) {
    const words = text.split(/\s+/).map((word) => word.replace(/^[^\p{L}\p{N}]+|[^\p{L}\p{N}]+$/gu, ""));
    const items = [...new Set(words)].filter(Boolean).map((word) => {
      const item = copyOf("word-template");
      const button = item.querySelector("button");
      button.textContent = word;
      button.addEventListener("click", () => this.look(text, word, button));
      return item;
    });
    this.find(".words ul").replaceChildren(...items);
    this.find(".words").hidden = items.length === 0;
    this.showHeat(null);
  }

  /** Show the heat map of a word; if it is shown already, show the picture again. */
  look(text, word, button) {
    if (button.getAttribute("aria-pressed") === "true") {
      this.showHeat(null);
      return;
    }
    work(button, this.find(".words .error"), async () => {
      this.showHeat(await explain(this.file, text, word, this.signal), word, button);
    });
  }

  showHeat(blob, word, button) {
    const [picture, heat] = [this.find(".picture"), this.find(".heat")];
    for (const each of this.element.querySelectorAll(".word")) {
      each.setAttribute("aria-pressed", String(each === button));
    }
    URL.revokeObjectURL(heat.src);
    heat.hidden = !blob;
    picture.hidden = Boolean(blob) || !this.viewable;
    say(this.find(".seen"), blob ? `Where “${word}” is seen: red most, blue least` : "");
    if (!blob) return heat.removeAttribute("src");
    heat.src = URL.createObjectURL(blob);
    heat.alt = `Heat map of ${this.file.name}: where “${word}” is seen`;
    announce(heat.alt);
  }

  onSubmit(form, job) {
    this.find(form).addEventListener("submit", (event) => {
      event.preventDefault();
      work(this.find(`${form} button`), this.find(`${form} .error`), job);
    });
  }

  async ask() {
    const question = this.find(".ask input").value.trim();
    refuse(refusedTexts(question ? [question] : []));
    const { answer, score } = await ask(this.file, question, this.signal);
    const entry = copyOf("answer-template");
    entry.querySelector("dt").textContent = question;
    entry.querySelector(".text").textContent = answer;
    entry.querySelector(".number").textContent = figure(score);
    this.find(".answers").prepend(entry);
  }

  async rank() {
    const texts = this.find(".rank textarea").value.split("\n").map((text) => text.trim()).filter(Boolean);
    refuse(refusedTexts(texts));
    const scores = await score(this.file, texts, this.signal);
    const lines = scores.toSorted((a, b) => b.itm - a.itm).map(({ text, itm }) => {
      const line = copyOf("rank-template");
      line.querySelector(".text").textContent = text;
      line.querySelector(".score").textContent = percent(itm);
      line.querySelector("i").style.width = `${100 * itm}%`;
      return line;
    });
    this.find(".ranking").replaceChildren(...lines);
  }
}

function refuse(sentence) {
  if (sentence) throw new Error(sentence);
}
