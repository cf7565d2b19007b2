// Helpers for the document. Texts are inserted by textContent only.

/** The element in a new copy of a template. */
export function copyOf(template) {
  return document.getElementById(template).content.cloneNode(true).firstElementChild;
}

/** Show a sentence in an element, or hide the element if the sentence is empty. */
export function say(element, sentence) {
  element.textContent = sentence;
  element.hidden = !sentence;
}

/** Let a screen reader say a sentence. */
export function announce(sentence) {
  document.getElementById("announcer").textContent = sentence;
}

/** A log-probability or a cosine, with a proper minus sign. */
export function figure(value) {
  return value.toFixed(2).replace("-", "−");
}

/** A probability in per cent. It is rounded to 0 % or 100 % only if it is exactly that. */
export function percent(value) {
  if (value > 0 && value < 0.01) return "< 1 %";
  if (value > 0.99 && value < 1) return "> 99 %";
  return `${Math.round(100 * value)} %`;
}

/** A number of bytes for people. */
export function bytes(count) {
  if (count < 1e6) return `${Math.ceil(count / 1e3)} kB`;
  return `${Number((count / 1e6).toFixed(1))} MB`;
}

/** A number of pixels for people. */
export function pixels(count) {
  return count < 1e6 ? `${count} pixels` : `${Math.floor(count / 1e6)} megapixels`;
}

/** Run the work of a form or a button. Its error is shown, and it cannot be started again while it runs. */
export async function work(button, error, job) {
  if (button.getAttribute("aria-disabled") === "true") return;
  say(error, "");
  button.setAttribute("aria-disabled", "true");
  try {
    await job();
  } catch (caught) {
    if (caught.name !== "AbortError") say(error, caught.message);
  } finally {
    button.removeAttribute("aria-disabled");
  }
}
