import { $, drawRounds, show } from "./rounds.js";

// One page, no library. A run is one streamed answer in one pane; a race is two runs, one after the other.

let stop = null; // aborts what is running
let runs = []; // in the panes
let dirty = false; // is a frame asked for?

// --- what the server says

async function* eventsOf(body, signal) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  let answer;
  try {
    answer = await fetch("playground/stream", { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    throw signal.aborted ? error : new Error("The server cannot be reached: is it still running?");
  }
  if (!answer.ok) throw await errorOf(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw signal.aborted ? error : new Error("The connection broke before the answer ended.");
    }
    if (part.done) throw new Error("The connection broke before the answer ended.");
    const lines = (rest + part.value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(sentence(event.error.message));
      yield event;
    }
  }
}

async function errorOf(answer) {
  let told;
  try {
    told = (await answer.json()).error.message;
  } catch {
    told = `the server answered with status ${answer.status}`;
  }
  if (answer.status === 401) {
    askForKey();
    return new Error($("key").value ? "The server does not know this API key." : "This server asks for an API key: type it above.");
  }
  return new Error(sentence(told));
}

function askForKey() {
  $("key-field").hidden = false;
  $("key").focus();
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

// --- a run

class Run {
  constructor(title, prompt) {
    const pane = $("pane").content.firstElementChild.cloneNode(true);
    this.pane = pane;
    this.title = pane.querySelector("h2");
    this.output = pane.querySelector(".text");
    this.title.textContent = title;
    this.output.setAttribute("aria-label", `Text: ${title}`);
    $("panes").append(pane);
    this.prompt = prompt;
    this.rounds = [];
    this.ended = null;
    this.clear();
  }

  clear() {
    this.text = "";
    this.count = 0;
    this.drawn = 0;
    this.waiting = [];
    const before = document.createElement("span");
    before.className = "prompt";
    before.textContent = this.prompt;
    this.output.replaceChildren(before);
  }

  async play(body, signal) {
    show(this);
    for await (const event of eventsOf(body, signal)) {
      if (event.type === "start") this.started(event);
      if (event.type === "round") {
        this.rounds.push(event);
        this.take(event);
      }
      if (event.type === "end") this.ended = event;
    }
  }

  started(event) {
    this.method = event.method;
    this.title.textContent = event.method === "plain" ? "Plain decoding" : event.method;
    this.output.setAttribute("aria-label", `Text: ${this.title.textContent}`);
  }

  take(round) {
    this.count += round.tokens.length;
    for (const token of round.tokens) this.text += token.text;
    this.waiting.push(round);
    this.drawn += 1;
    redraw();
  }

  // Tokens a second of rounds: from the first one, so that reading the prompt does not count.
  figures() {
    const seen = this.rounds.slice(0, this.drawn), first = seen[0], last = seen[seen.length - 1];
    const seconds = seen.length > 1 ? last.at - first.at : 0;
    return {
      seconds: last ? last.at : 0,
      won: last ? last.won : null,
      speed: seconds > 0 ? (this.count - first.tokens.length) / seconds : 0,
      tau: seen.length ? this.count / seen.length : 0,
    };
  }

  draw() {
    const added = document.createDocumentFragment();
    for (const round of this.waiting) {
      for (const token of round.tokens) {
        if (!token.text) continue; // half a character, or a token without text
        const span = document.createElement("span");
        span.className = "token " + token.origin;
        span.title = token.origin;
        span.textContent = token.text;
        added.append(span);
      }
    }
    this.waiting = [];
    const atEnd = this.output.scrollHeight - this.output.scrollTop - this.output.clientHeight < 40;
    this.output.append(added);
    if (atEnd) this.output.scrollTop = this.output.scrollHeight;
    const { seconds, won, speed, tau } = this.figures();
    const put = (name, text) => { this.pane.querySelector("." + name).textContent = text; };
    put("count", this.count);
    put("speed", speed ? speed.toFixed(speed < 100 ? 1 : 0) : "–");
    put("tau", tau ? tau.toFixed(2) : "–");
    put("seconds", seconds ? seconds.toFixed(2) : "–");
    put("won", won == null ? "–" : won.toFixed(2));
  }
}

function redraw() {
  if (dirty) return;
  dirty = true;
  const draw = () => { dirty = false; for (const run of runs) run.draw(); drawRounds(); };
  // A page in the background gets no frames.
  if (document.hidden) setTimeout(draw, 100); else requestAnimationFrame(draw);
}

// --- what the buttons do

function fields() {
  const number = (id) => Number($(id).value);
  const body = { prompt: $("prompt").value, max_tokens: number("max_tokens"), temperature: number("temperature") };
  Object.assign(body, { top_p: number("top_p"), seed: number("seed"), chat: $("chat").checked });
  if ($("stop").value) body.stop = $("stop").value.replaceAll("\\n", "\n");
  return body;
}

const say = (text) => { $("status").textContent = text; };

function setState(state) {
  document.body.dataset.state = state;
  for (const id of ["start", "race", "replay"]) $(id).disabled = state === "running";
  $("stop-button").disabled = state !== "running";
  $("panes").setAttribute("aria-busy", state === "running");
}

async function during(work) {
  if (stop || !$("form").reportValidity()) return;
  stop = new AbortController();
  $("error").hidden = true;
  setState("running");
  let state = "done";
  try {
    await work(stop.signal);
  } catch (error) {
    const aborted = stop.signal.aborted;
    state = aborted ? "stopped" : "error";
    if (aborted) say(`Stopped after ${runs.length ? runs[runs.length - 1].count : 0} tokens.`);
    else {
      say("");
      $("error").textContent = error.message;
      $("error").hidden = false;
    }
  }
  stop = null;
  for (const run of runs) run.draw();
  drawRounds();
  setState(state);
}

function begin(titles) {
  const body = fields();
  $("panes").replaceChildren();
  $("after-race").hidden = true;
  $("results").className = titles.length === 1 ? "one" : "";
  show(null);
  runs = titles.map((title) => new Run(title, body.chat ? "" : body.prompt));
  return body;
}

function complete() {
  return during(async (signal) => {
    const body = begin(["Completion"]), [run] = runs;
    say("Decoding …");
    await run.play(body, signal);
    say(`${sentence(whyEnded(run.ended.finish))} ${run.count} tokens in ${run.rounds.length} rounds.`);
  });
}

const whyEnded = (finish) => (finish === "length" ? "the most tokens were reached" : "the model ended its text");

function race() {
  return during(async (signal) => {
    const body = begin(["With drafts", "Plain decoding"]), [own, plain] = runs;
    // One after the other: together they would share every round, and the slower one would hold up the faster.
    say("The method of this server decodes …");
    await own.play(body, signal);
    say("Plain decoding with the same seed …");
    await plain.play({ ...body, drafts: false }, signal);
    show(own);
    $("after-race").hidden = false;
    say(verdict(own, plain));
  });
}

function verdict(own, plain) {
  const times = own.figures().speed / plain.figures().speed;
  const pace = Number.isFinite(times) && times > 0 ? ` ${own.method} was ${times.toFixed(2)} times as fast as plain decoding.` : "";
  document.body.dataset.equal = own.text === plain.text;
  if (own.text === plain.text) return `Both wrote the same text, ${plain.count} tokens.${pace}`;
  let at = 0;
  while (own.text[at] === plain.text[at]) at += 1;
  return `The texts differ from character ${at + 1} on. In half precision two almost equally probable tokens can change places; ` +
    `in float32 this is a bug: please report it.${pace}`;
}

// The two runs again, at the times at which their rounds came.
function replay() {
  return during(async (signal) => {
    const told = $("status").textContent;
    say("Replaying …");
    for (const run of runs) run.clear();
    const began = performance.now();
    await new Promise((done, fail) => {
      signal.addEventListener("abort", () => fail(new Error("stopped")), { once: true });
      const tick = () => {
        const now = (performance.now() - began) / 1000;
        for (const run of runs) {
          const from = run.rounds[0].at;
          while (run.drawn < run.rounds.length && run.rounds[run.drawn].at - from <= now) run.take(run.rounds[run.drawn]);
        }
        if (signal.aborted) return;
        if (runs.every((run) => run.drawn === run.rounds.length)) done(); else setTimeout(tick, 15);
      };
      tick();
    });
    say(told);
  });
}

const abort = () => { if (stop) stop.abort(); };

$("form").addEventListener("submit", (event) => { event.preventDefault(); complete(); });
$("race").addEventListener("click", race);
$("replay").addEventListener("click", replay);
$("stop-button").addEventListener("click", abort);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); complete(); }
});

setState("idle");
fetch("v1/models").then(async (answer) => {
  if (answer.status === 401) return askForKey();
  const [card] = (await answer.json()).data;
  $("model").textContent = `${card.id}, context of ${card.max_model_len} tokens`;
}).catch(() => {});
