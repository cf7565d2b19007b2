// Small things about the document that every part of the page uses. Texts enter it by textContent alone.

/** The element inside a fresh copy of a template. */
export function copyOf(template) {
  return document.getElementById(template).content.cloneNode(true).firstElementChild;
}

/** Show a sentence in an element, or hide it where there is none. */
export function say(element, sentence) {
  element.textContent = sentence;
  element.hidden = !sentence;
}

/** Let a screen reader say a sentence. */
export function announce(sentence) {
  document.getElementById("announcer").textContent = sentence;
}

/** A log-probability or a cosine, with a real minus sign. */
export function figure(value) {
  return value.toFixed(2).replace("-", "−");
}

/** A probability in per cent; what is not certain is not called so. */
export function percent(value) {
  if (value > 0 && value < 0.01) return "< 1 %";
  if (value > 0.99 && value < 1) return "> 99 %";
  return `${Math.round(100 * value)} %`;
}

/** Bytes as people read them. */
export function bytes(count) {
  if (count < 1e6) return `${Math.ceil(count / 1e3)} kB`;
  return `${Number((count / 1e6).toFixed(1))} MB`;
}

/** So many pixels as people read them. */
export function pixels(count) {
  return count < 1e6 ? `${count} pixels` : `${Math.floor(count / 1e6)} megapixels`;
}

/** Run a form's or button's work: the error that it ends with is shown, and it cannot be started twice at once. */
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
