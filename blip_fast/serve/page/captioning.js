// Captions cards in requests as large as the server accepts, one after another. So a thousand pictures that are
// dropped at once do not fill its queue, and the first captions appear early. If the queue is full, cards wait.

import { captions, Refusal } from "./api.js";
import { oneRequest } from "./limits.js";

let waiting = [];
let sending = false;

/** Caption cards in order. `options` returns `num` and `prompt`, and is called for each request. */
export async function caption(cards, options) {
  for (const card of cards) card.isWaiting();
  waiting.push(...cards);
  if (sending) return;
  sending = true;
  while ((waiting = waiting.filter((card) => !card.removed)).length) {
    const together = oneRequest(waiting, (card) => card.file);
    waiting = waiting.slice(together.length);
    const seconds = await send(together, options());
    if (seconds) {
      for (const card of together) card.isWaiting();
      waiting.unshift(...together);
      await new Promise((wake) => setTimeout(wake, 1000 * seconds));
    }
  }
  sending = false;
}

/** Caption cards in one request. Resolves to the seconds after which to send them again, or 0 if answered. */
async function send(cards, options) {
  const unanswered = new Set(cards);
  for (const card of cards) card.isSent();
  let failure = new Refusal("broken_off", "The server's answer ended before this picture's caption.");
  try {
    for await (const row of captions(cards.map((card) => card.file), options, whenAllAreRemoved(cards))) {
      const card = cards[row.index];
      unanswered.delete(card);
      if (card.removed) continue;
      if (row.error) card.hasFailed(row.error);
      else card.isCaptioned(row.captions);
    }
  } catch (error) {
    failure = error;
  }
  if (failure.code === "busy" && failure.seconds) return failure.seconds;
  for (const card of unanswered) if (!card.removed) card.hasFailed(failure);
  return 0;
}

/** A signal that aborts a request when all of its cards have been removed. */
function whenAllAreRemoved(cards) {
  const request = new AbortController();
  for (const card of cards) {
    card.signal.addEventListener("abort", () => cards.every((each) => each.removed) && request.abort());
  }
  return request.signal;
}
